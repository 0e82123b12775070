"""The image built and run for real: minutes, so only where TSMOE_IMAGE_BUILDER names a builder."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TAG = "tsmoe-under-test"
UID = 1000
CORPUS = "corpus=runs/corpus"

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(
        not os.environ.get("TSMOE_IMAGE_BUILDER"),
        reason="takes minutes; set TSMOE_IMAGE_BUILDER=docker (podman, buildah) to run it",
    ),
]


@pytest.fixture(scope="module")
def image() -> Iterator[object]:
    """Build the working tree as it is and give the builder that can run it."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    from container_builder import ContainerBuilder

    builder = ContainerBuilder.from_environment()
    builder.build(TAG, REPOSITORY)
    yield builder
    builder.remove(TAG)
    sys.path.remove(str(REPOSITORY / "benchmarks"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder for runs that belongs to the image's user, who can reach it."""
    folder = tmp_path_factory.mktemp("runs")
    if os.getuid() == 0:
        os.chown(folder, UID, UID)
        for parent in list(folder.parents)[:3]:
            parent.chmod(parent.stat().st_mode | 0o711)
    return folder


@pytest.fixture(scope="module")
def run(image, runs) -> Callable[..., str]:
    """Run words in a fresh container that must end well, and return what was printed."""
    user = None if os.getuid() == 0 else f"{os.getuid()}:{os.getgid()}"

    def in_container(*words: str, user: str | None = user, **options: bool) -> str:
        mounts = {runs: "/workspace/runs"}
        done = image.run(TAG, words, mounts=mounts, user=user, **options)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout

    return in_container


@pytest.fixture(scope="module")
def trained(run, runs) -> Path:
    """The folder of a run of three steps on two ranks under the deepspeed launcher."""
    run("data", "build", "tiny", "--out", "runs/corpus")
    run(
        "deepspeed", "--num_accelerators", "2", "--module", "tsmoe", "pretrain",
        "time_tracker_tiny", "run=runs/two_ranks", CORPUS, "training.steps=3",
        "training.micro_batch_size=8", "training.global_batch_size=16",
    )  # fmt: skip
    return runs / "two_ranks"


def test_words_reach_tsmoe(run) -> None:
    assert run("--version").startswith("tsmoe ")


def test_it_runs_as_an_ordinary_user_also_with_another_number(run) -> None:
    assert run("id", "-u", user=None, uses_entrypoint=False).strip() == str(UID)
    script = "import tsmoe.train, getpass, tempfile; print(getpass.getuser()); open('here', 'w')"
    assert run("python", "-c", script, user="4321:4321").strip() == "tsmoe"


def test_it_keeps_health_check_and_labels(image) -> None:
    settings = image.settings(TAG)
    assert settings["Healthcheck"]["Test"] == ["CMD", "container-health"]
    assert settings["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_two_ranks_train_and_the_files_belong_to_the_user(trained) -> None:
    assert (trained / "DONE").exists()
    lines = (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss/train"] for line in lines if '"loss/train"' in line]
    assert len(losses) == 3
    owner = UID if os.getuid() == 0 else os.getuid()
    assert {path.stat().st_uid for path in trained.rglob("*")} == {owner}


def test_the_table_of_the_first_run_is_in_the_image(run, runs, trained) -> None:
    run("export", "runs/two_ranks", "runs/package")
    table = "data_pipeline/tiny/eval_jfk_weather.parquet"
    run("evaluate", "runs/package", "--data", table, "--json", "runs/errors.json")
    models = {r["model"] for r in json.loads((runs / "errors.json").read_text())["results"]}
    assert {"tsmoe", "naive", "seasonal_naive", "linear"} <= models


def test_a_stop_lets_the_ranks_behind_the_launcher_save(run, runs, trained) -> None:
    words = (
        "deepspeed --num_accelerators 2 --module tsmoe pretrain time_tracker_tiny run=runs/stopped "
        f"{CORPUS} training.micro_batch_size=8 training.global_batch_size=16"
    )
    # What `docker stop` does, and then waits for.
    script = (
        f"container-entry {words} & entry=$!; until [ -s runs/stopped/metrics.jsonl ]; "
        "do kill -0 $entry || exit 1; sleep 1; done; kill -TERM $entry; wait $entry; echo code $?"
    )
    printed = run("sh", "-c", script, uses_entrypoint=False)
    step = int((runs / "stopped/REQUEUE").read_text(encoding="utf-8"))
    assert step > 0
    assert (runs / f"stopped/checkpoints/step_{step:08d}").is_dir(), printed


def test_the_first_run_itself_starts_from_the_image(run) -> None:
    run("sh", "-n", ".ci/pretrain")
    run("python", "-c", "import json; json.load(open('ds_configs/zero1.json'))")


def test_nothing_of_the_program_can_be_changed_by_its_user(run) -> None:
    script = "import os, tsmoe; print(os.access(os.path.dirname(tsmoe.__file__), os.W_OK))"
    assert run("python", "-c", script).strip() == "False"
