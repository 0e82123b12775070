"""Pretraining straight from a stream: stopped and started again, on one rank and on two."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rank_pool import run_on_ranks
from small_run import build_small_corpus, small_config
from stream_data import NUM_SERIES, write_stream
from tsmoe.config import encode, merge_layers
from tsmoe.errors import CheckpointError, ConfigError, DataError
from tsmoe.train.loop import Outcome, pretrain
from tsmoe.train.run_config import RunConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_stream(tmp_path_factory.mktemp("stream"), is_random=True)


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


def recorded(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    found = {v["step"]: v["loss/train"] for v in recorded(run) if "loss/train" in v}
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


def test_other_stream_is_refused_by_the_setting_or_the_files_that_differ(folder, tmp_path) -> None:
    data = write_stream(tmp_path / "data", is_random=True)
    run = tmp_path / "run"
    assert pretrain(config_of(data, run, steps=4)) is Outcome.DONE

    def refused(folder: Path, **stream: object) -> str:
        config = config_of(folder, run, steps=8)
        with pytest.raises(CheckpointError) as caught:
            pretrain(replace(config, stream=replace(config.stream, **stream)))
        return str(caught.value)

    assert f"stream.path={data}, but stream.path is {folder}" in refused(folder)
    assert "stream.revision=None, but stream.revision is abc" in refused(data, revision="abc")
    assert "stream.mixed_windows=40, but" in refused(data, mixed_windows=41)
    pretrain(config_of(data, run, steps=5, max_validation_windows=9))  # no matter of the order
    (data / "data-00003.parquet").unlink()
    message = refused(data)
    assert "fingerprint" in message
    assert "its files are others now" in message


def test_run_on_a_corpus_does_not_go_on_with_a_stream(folder, tmp_path) -> None:
    run = tmp_path / "run"
    settings = {"run": str(run), "training": {"steps": 2}}
    corpus = build_small_corpus(tmp_path / "small")
    pretrain(small_config(corpus, settings))
    with pytest.raises(CheckpointError, match="trained on a corpus, but this run is from a stream"):
        pretrain(config_of(folder, run, steps=4))
    streamed = tmp_path / "streamed"
    pretrain(config_of(folder, streamed, steps=2))
    with pytest.raises(CheckpointError, match="trained from a stream, but this run is on a corpus"):
        pretrain(small_config(corpus, settings, {"run": str(streamed), "training": {"steps": 4}}))


@pytest.mark.launch
def test_killed_run_has_the_losses_of_the_undisturbed_one(folder, tmp_path) -> None:
    """Killed again and again at moments of its own, over many epochs."""
    settings = {"training": {"steps": 60}, "checkpoint": {"every_steps": 5}}
    configs = {name: merge_layers(encode(config_of(folder, tmp_path / name, steps=60)), settings)
               for name in ("whole", "killed")}  # fmt: skip
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    whole = subprocess.run(command(tmp_path / "whole.yaml"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    kills = 0
    for step in (5, 20, 40):
        process = subprocess.Popen(command(tmp_path / "killed.yaml"), stderr=subprocess.DEVNULL)
        while process.poll() is None and saved_step(tmp_path / "killed") < step:
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills, "the run was over before it was killed"
    ended = subprocess.run(command(tmp_path / "killed.yaml"), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    told = [line["stream"] for line in recorded(tmp_path / "whole") if "stream" in line]
    assert told[-1]["epoch"] > 3
    assert told == [line["stream"] for line in recorded(tmp_path / "killed") if "stream" in line]


def command(config_file: Path) -> list[str]:
    return [sys.executable, "-m", "tsmoe", "pretrain", str(config_file)]


def saved_step(run: Path) -> int:
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().removeprefix("step_")) if latest.exists() else 0


def test_what_is_left_out_stands_in_the_metrics(tmp_path) -> None:
    data = write_stream(tmp_path / "data", is_random=True)
    rows = pa.table({"target": pa.array([[1.0] * 300, None, [0.0, 1.0]], pa.list_(pa.float32()))})
    pq.write_table(rows, data / "data-00006.parquet")
    run = tmp_path / "run"
    config = config_of(data, run, steps=8)
    pretrain(replace(config, training=replace(config.training, log_every_steps=7)))
    first, last = (line["stream"] for line in recorded(run) if "stream" in line)
    assert first == {"epoch": 0, "used": 0, "drops": {}}, "the block of the first batches"
    assert last["epoch"] > 0
    assert last["drops"].keys() == {"constant", "not_numeric", "too_short"}
    assert last["used"] >= NUM_SERIES * last["epoch"]


def test_error_of_one_rank_ends_all(tmp_path) -> None:
    """The second rank gets no row: two of them cannot wait for it in their first step."""
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"target": [list(range(300))]}), data / "a.parquet")
    said = run_on_ranks(refusal, config_of(data, tmp_path / "run", steps=4))
    assert "has no row for rank 1 of 2; check stream.path" in said[1]
    assert said[0] == f"rank 1 says: {said[1]}"


def refusal(config: RunConfig) -> str:
    """Train, and return the error. For `run_on_ranks`."""
    try:
        pretrain(config)
    except DataError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"packs_short_series": True}, "data.packs_short_series is True, but stream is set"),
        ({"source_weights": {"a": 2}}, "data.source_weights"),
        ({"resident_shards": 2}, "data.resident_shards is 2"),
        ({"num_workers": 2}, r"data.num_workers \(2\) must be 0 or 1"),
        ({"window_stride": 4}, "data.window_stride is 4, but stream is set"),
        ({"source_temperature": 1.0}, "data.source_temperature is 1.0"),
    ],
)
def test_what_needs_a_corpus_is_refused(folder, tmp_path, data, words) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(folder, tmp_path, steps=4, **data)


def test_neither_corpus_nor_stream_is_refused() -> None:
    layers = merge_layers({"corpus": None})
    with pytest.raises(ConfigError, match=r"corpus is not set; give corpus=FOLDER, or stream.path"):
        small_config(Path("none"), layers)
