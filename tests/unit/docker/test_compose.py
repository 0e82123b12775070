"""compose.yaml means what it says: commands that parse, a loopback port, volumes that exist."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tsmoe.__main__ import build_parser
from tsmoe.train.run_config import check_batches, resolve

REPOSITORY = Path(__file__).resolve().parents[3]
FOLDER = REPOSITORY / "docker"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
CUDA = yaml.safe_load((FOLDER / "compose.cuda.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


def words_of_tsmoe(command: list[str]) -> list[str] | None:
    """Return the words that `tsmoe` gets by way of the entry point; None for other programs."""
    if command[0] == "deepspeed":
        return command[command.index("--module") + 2 :]
    return None if command[0] == "tensorboard" else command


def test_there_is_a_corpus_then_training_and_tensorboard() -> None:
    assert set(SERVICES) == {"corpus", "training", "tensorboard"}
    finished = {"corpus": {"condition": "service_completed_successfully"}}
    assert SERVICES["training"]["depends_on"] == finished


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_runs_the_image_of_this_dockerfile(service) -> None:
    assert SERVICES[service]["image"] == "tsmoe"
    build = SERVICES[service]["build"]
    assert (FOLDER / build["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / build["dockerfile"]) == FOLDER / "Dockerfile"


@pytest.mark.parametrize("service", SERVICES)
def test_commands_are_lists_that_the_programs_parse(service) -> None:
    command = SERVICES[service]["command"]
    assert all(isinstance(word, str) for word in command)
    words = words_of_tsmoe(command)
    if words is not None:
        build_parser().parse_args(words)


def test_training_reads_the_corpus_that_is_built_with_ranks_that_divide_its_batch() -> None:
    command = SERVICES["training"]["command"]
    preset, *settings = words_of_tsmoe(command)[1:]
    config = resolve(preset, settings)
    corpus = SERVICES["corpus"]["command"]
    assert config.corpus == corpus[corpus.index("--out") + 1]
    check_batches(config.training, world_size=int(command[command.index("--num_accelerators") + 1]))


def test_tensorboard_is_reached_from_this_machine_alone() -> None:
    ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(ports) == ["tensorboard"]
    command = SERVICES["tensorboard"]["command"]
    inside = command[command.index("--port") + 1]
    for port in ports["tensorboard"]:
        address, _, container_port = port.rsplit(":", 2)
        assert address == "127.0.0.1"
        assert container_port == inside


def test_runs_survive_in_a_named_volume_that_tensorboard_only_reads() -> None:
    mounts = {name: service["volumes"] for name, service in SERVICES.items()}
    used = {mount.split(":")[0] for service in mounts.values() for mount in service}
    assert used == set(COMPOSE["volumes"])
    (folder,) = {mount.split(":")[1] for service in mounts.values() for mount in service}
    # Docker gives a new volume the owner of the image's folder of that name.
    assert f" {folder} " in DOCKERFILE
    assert mounts["tensorboard"] == [f"runs:{folder}:ro"]


def test_training_has_time_to_save_and_goes_on_after_a_crash() -> None:
    training = SERVICES["training"]
    assert int(training["stop_grace_period"].removesuffix("s")) > 30  # what deepspeed waits for
    assert training["restart"].startswith("on-failure")


def test_cuda_swaps_the_image_and_gives_each_rank_a_device() -> None:
    assert set(CUDA["services"]) == set(SERVICES)
    for service in CUDA["services"].values():
        assert service["image"] != COMPOSE["x-image"]["image"]
        for argument in service["build"]["args"]:
            assert f"ARG {argument}=" in DOCKERFILE
    (devices,) = CUDA["services"]["training"]["deploy"]["resources"]["reservations"]["devices"]
    command = SERVICES["training"]["command"]
    assert devices["count"] == int(command[command.index("--num_accelerators") + 1])
    assert devices["capabilities"] == ["gpu"]
