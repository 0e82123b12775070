"""Pretraining straight from a stream: stopped and started again, on one rank and on two."""

import json
from pathlib import Path

import pytest

from rank_pool import run_on_ranks
from small_run import small_config
from stream_data import write_stream
from tsmoe.config import merge_layers
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.train.loop import Outcome, pretrain
from tsmoe.train.run_config import RunConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"))


def config_of(folder: Path, run: Path, *, steps: int, **data: object) -> RunConfig:
    settings = {
        "run": str(run),
        "corpus": None,
        "stream": {"path": str(folder), "mixed_windows": 40},
        "training": {"steps": steps, "global_batch_size": 16, "micro_batch_size": 4},
        "data": data,
    }
    return small_config(Path("none"), settings)


def train(config: RunConfig) -> str:
    """Train, and name the outcome. For `run_on_ranks`."""
    return pretrain(config).name


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = {v["step"]: v["loss/train"] for v in map(json.loads, lines) if "loss/train" in v}
    return [found[step] for step in sorted(found)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_run_that_goes_on_has_the_losses_of_the_undisturbed_one(
    folder, tmp_path, num_workers
) -> None:
    # The schedule depends on the number of steps, so a run is cut by losing its last checkpoint.
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pretrain(config_of(folder, whole, steps=12)) is Outcome.DONE
    settings = {"steps": 12, "num_workers": num_workers, "mixup_share": 0.0}
    pretrain(config_of(folder, cut, **settings))
    (cut / "checkpoints" / "step_00000012" / "meta.json").unlink()
    (cut / "checkpoints" / "latest").write_text("step_00000008")
    (cut / "metrics.jsonl").unlink()
    assert pretrain(config_of(folder, cut, **settings)) is Outcome.DONE
    assert losses(cut) == losses(whole)[8:]
    meta = json.loads((cut / "checkpoints" / "step_00000012" / "meta.json").read_text())
    assert len(meta["stream"]) == 1


def test_two_ranks_go_on_and_another_number_is_refused(folder, tmp_path) -> None:
    run = tmp_path / "run"
    assert run_on_ranks(train, config_of(folder, run, steps=8)) == ["DONE", "DONE"]
    first = losses(run)
    (run / "checkpoints" / "step_00000008" / "meta.json").unlink()
    (run / "checkpoints" / "latest").write_text("step_00000004")
    run_on_ranks(train, config_of(folder, run, steps=8))
    assert losses(run) == first
    with pytest.raises(CheckpointError, match="streamed by 2 ranks, but there are 1"):
        pretrain(config_of(folder, run, steps=12))


def test_other_stream_and_corpus_are_refused(folder, tmp_path) -> None:
    run = tmp_path / "run"
    config = config_of(folder, run, steps=4)
    pretrain(config)
    other = tmp_path / "other"
    other.mkdir()
    write_stream(other)
    with pytest.raises(CheckpointError, match="fingerprint"):
        pretrain(config_of(other, run, steps=8))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"packs_short_series": True}, "data.packs_short_series is True, but stream is set"),
        ({"source_weights": {"a": 2}}, "data.source_weights"),
        ({"resident_shards": 2}, "data.resident_shards is 2"),
        ({"num_workers": 2}, r"data.num_workers \(2\) must be 0 or 1"),
    ],
)
def test_what_needs_a_corpus_is_refused(folder, tmp_path, data, words) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(folder, tmp_path, steps=4, **data)


def test_neither_corpus_nor_stream_is_refused() -> None:
    layers = merge_layers({"corpus": None})
    with pytest.raises(ConfigError, match=r"corpus is not set; give corpus=FOLDER, or stream.path"):
        small_config(Path("none"), layers)
