"""What real runs leave in tensorboard: the listed tags and no others, also after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from finetune_run import small_finetune, write_package, write_table
from small_run import SMALL, build_small_corpus
from tsmoe.__main__ import main
from tsmoe.config import merge_layers
from tsmoe.finetune.loop import finetune
from tsmoe.status import Health, look_at
from tsmoe.train.board import FORECASTS_TAG, TAGS, listed

STEPS, LOG, VALIDATE, SAVE = 40, 2, 5, 10
TIMEOUT = 120
# Tags of other runs than these; tests/unit/train/test_training_metrics.py has them written.
OF_FEW = {"loss/regulariser", "experts/dead/layer_{layer}", "stream/epoch", "stream/series_used",
          "stream/dropped"}  # fmt: skip


def board_of(run: Path) -> EventAccumulator:
    kept = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(run / "tensorboard"), size_guidance=kept).Reload()


def tags_of(board: EventAccumulator) -> list[tuple[str, str]]:
    """Kind and name of every tag, but for the layout, which is of no value itself."""
    tags = board.Tags()
    texts = [name for name in tags["tensors"] if name != "custom_scalars__config__"]
    named = {"scalars": tags["scalars"], "images": tags["images"], "text": texts}
    return [(kind, name) for kind, names in named.items() for name in names]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one process that was killed between two checkpoints, and went on to its end."""
    folder = tmp_path_factory.mktemp("board")
    settings = merge_layers(SMALL, {
        "corpus": str(build_small_corpus(folder / "small")),
        "training": {"steps": STEPS, "log_every_steps": LOG, "validate_every_steps": VALIDATE},
        "checkpoint": {"every_steps": SAVE},
    })  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["pretrain", str(folder / "small.yaml"), f"run={folder / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tsmoe", *arguments], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for_steps_after_a_checkpoint(folder / "run", process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert not (folder / "run" / "DONE").exists()
    killed_at = look_at(folder / "run")
    assert killed_at.checkpoint is not None
    # Steps that are done twice, or there is nothing to see.
    assert killed_at.step > killed_at.checkpoint.step + LOG
    assert main(arguments) == 0
    return folder / "run"


def wait_for_steps_after_a_checkpoint(run: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        if (run / "checkpoints" / "latest").exists():
            status = look_at(run)
            if status.checkpoint is not None and status.step > status.checkpoint.step + LOG:
                return
        time.sleep(0.002)


@pytest.mark.launch
def test_run_writes_every_listed_tag_and_no_other(run: Path) -> None:
    found = {(kind, name): listed(name, kind) for kind, name in tags_of(board_of(run))}
    assert [name for name, tag in found.items() if tag is None] == []
    missing = {tag.name for tag in TAGS} - {tag.name for tag in found.values()}
    assert missing == OF_FEW


@pytest.mark.launch
def test_no_step_is_there_twice_and_none_is_missing_after_a_kill(run: Path) -> None:
    assert len(list((run / "tensorboard").iterdir())) == 2
    board = board_of(run)
    for name in board.Tags()["scalars"]:
        steps = [event.step for event in board.Scalars(name)]
        if name in ("loss/validation", "speed/validation_seconds"):
            assert steps == list(range(VALIDATE - 1, STEPS, VALIDATE)), name
        elif listed(name, "scalars").is_there:
            assert steps == sorted(set(steps)), name
        else:
            assert steps == list(range(0, STEPS, LOG)), name
    for name in board.Tags()["images"]:
        assert [e.step for e in board.Images(name)] == list(range(VALIDATE - 1, STEPS, VALIDATE))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss/train"] for line in lines if "loss/train" in line}
    for event in board.Scalars("loss/train"):
        assert event.value == pytest.approx(losses[event.step], rel=1e-6)


@pytest.mark.launch
def test_layout_has_charts_that_find_their_tags(run: Path) -> None:
    board = board_of(run)
    (content,) = board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    groups = {group.title: group for group in Layout.FromString(content).category}
    assert list(groups) == ["Loss", "Speed", "Experts", "Exchange", "Data"]
    charts = [chart.title for chart in groups["Experts"].chart]
    assert "load share, layer 01" in charts
    assert "load share, layer 02" not in charts


@pytest.mark.launch
def test_forecasts_change_while_their_windows_stay(run: Path) -> None:
    pictures = [event.encoded_image_string for event in board_of(run).Images(FORECASTS_TAG)]
    assert len(set(pictures)) == len(pictures) == STEPS // VALIDATE
    assert max(map(len, pictures)) < 100_000


@pytest.mark.launch
def test_status_of_the_run_is_that_of_its_metrics(run: Path) -> None:
    status = look_at(run)
    assert (status.health, status.step, status.steps_planned) == (Health.DONE, STEPS, STEPS)
    assert (status.ranks, status.validation_step) == (1, STEPS)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.damage) == (STEPS, None)


def test_fine_tuning_shows_its_forecasts_and_has_a_status(tmp_path: Path) -> None:
    table = write_table(tmp_path / "table.csv")
    package = write_package(tmp_path / "package", has_quantiles=True)
    run = tmp_path / "run"
    config = small_finetune(run, table, {"training": {"steps": 4}}, start=package)
    finetune(config)
    board = board_of(run)
    assert [name for kind, name in tags_of(board) if listed(name, kind) is None] == []
    assert [event.step for event in board.Images(FORECASTS_TAG)] == [1, 3]
    status = look_at(run)
    assert (status.health, status.step, status.steps_planned) == (Health.DONE, 4, 4)
