"""A disk that is really full for a while, or to the end: a small file system in memory."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from small_run import SMALL, build_small_corpus
from tsmoe.__main__ import main
from tsmoe.checkpoint.resume import newest_checkpoint
from tsmoe.config import merge_layers
from tsmoe.train import durable_record
from tsmoe.train.data_course import DataCourse

pytestmark = pytest.mark.launch

STEPS, EVERY = 24, 4
FULL_FROM = 9


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """Mount a disk of 4 MB, about four checkpoints."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount on this machine")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def fill(disk, monkeypatch):
    """Say from which step on the disk is full, and when it is free again."""

    steps: dict[str, int | None] = {}

    def next_micro_batches(self: DataCourse, step: int):
        if step == steps["first"]:
            _fill(disk / "ballast")
        if step == steps["free_again"]:
            (disk / "ballast").unlink()
        return real(self, step)

    def set_steps(first: int | None, free_again: int | None) -> None:
        steps.update(first=first, free_again=free_again)

    real = DataCourse.next_micro_batches
    monkeypatch.setattr(DataCourse, "next_micro_batches", next_micro_batches)
    # The writer's thread of tensorboard prints its error; it is told in one line too.
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    monkeypatch.setattr(durable_record, "_SECONDS_BETWEEN_TRIES", 0.0)
    return set_steps


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (65536, 1):  # to the last byte
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


@pytest.fixture
def config_file(tmp_path) -> Path:
    settings = {
        "corpus": str(build_small_corpus(tmp_path)),
        "training": {"steps": STEPS, "validate_every_steps": EVERY, "log_every_steps": 1},
        "checkpoint": {"every_steps": EVERY, "keep": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(merge_layers(SMALL, settings)))
    return path


def test_training_outlives_a_full_disk(config_file, disk, fill, caplog) -> None:
    fill(FULL_FROM, 15)
    run = disk / "run"
    assert main(["pretrain", str(config_file), f"run={run}"]) == 0
    assert (run / "DONE").read_text() == f"{STEPS}\n"
    text = caplog.text
    assert text.count("metrics.jsonl: cannot be written (") == 1
    assert text.count("tensorboard: cannot be written ([Errno 28] No space left") == 1
    assert text.count("checkpoint of step 12 was not saved") == 1
    assert "earlier checkpoints are untouched" in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recorded = {line["step"] for line in lines if "loss/train" in line}
    (missing,) = [line["missing"] for line in lines if "missing" in line]
    gap = set(range(missing["from_step"], missing["to_step"] + 1))
    assert gap
    assert gap < set(range(FULL_FROM - 1, 16))
    assert recorded | gap == set(range(STEPS))
    assert newest_checkpoint(run / "checkpoints")[1].step == STEPS
    assert not list((run / "checkpoints").glob(".*"))


def test_disk_that_stays_full_keeps_the_last_good_checkpoint_and_is_not_done(
    config_file, disk, fill, capsys
) -> None:
    fill(FULL_FROM, None)
    run = disk / "run"
    settings = ["pretrain", str(config_file), f"run={run}"]
    assert main(settings) == 3
    assert "the last checkpoint could not be saved" in capsys.readouterr().err
    assert not (run / "DONE").exists()
    assert newest_checkpoint(run / "checkpoints")[1].step == 8
    os.remove(disk / "ballast")
    fill(None, None)
    assert main(settings) == 0
    assert (run / "DONE").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/train" in line] == list(range(STEPS))
