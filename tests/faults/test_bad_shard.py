"""A shard that is damaged before a run, or that one rank cannot read amid it."""

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from data_pipeline.build import build_corpus
from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ShardError
from data_pipeline.shards.reader import Corpus
from data_pipeline.sources.csv import CsvSource
from rank_pool import run_on_ranks
from small_run import Settings, small_config
from tsmoe.__main__ import main
from tsmoe.data.loader import TrainingBatches
from tsmoe.train.loop import pretrain
from tsmoe.train.run_config import RunConfig

pytestmark = pytest.mark.launch

STEPS, BAD, FOUND_AT = 6, 5, 3
QUARANTINE: Settings = {
    "training": {"steps": STEPS},
    "checkpoint": {"every_steps": 2, "keep": STEPS},
    "data": {"on_bad_shard": "quarantine"},
}


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Build a corpus of two dozen shards."""
    generator = np.random.default_rng(0)
    for number in range(24):
        rows = "".join(f"{value:.6g}\n" for value in generator.normal(size=512).cumsum())
        (tmp_path / f"s{number:02}.csv").write_text(f"value\n{rows}")
    source = CsvSource(path=str(tmp_path / "*.csv"), source="walks")
    build_corpus(CorpusConfig(sources=[source], shard_size_bytes=4096), tmp_path / "corpus")
    return tmp_path / "corpus"


def shard_file(corpus: Path) -> Path:
    return corpus / Corpus.open(corpus).manifest.shards[BAD].file


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "the shard is damaged, expected"


def flip_a_bit(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "the content has changed, sha256 is"


def remove(path: Path) -> str:
    path.unlink()
    return "the shard is missing"


def recorded(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss/train"] for line in lines if "loss/train" in line]


def listed(run: Path) -> list[dict]:
    return json.loads((run / "quarantine.json").read_text())["shards"]


def pretrain_all(configs: list[RunConfig]) -> None:
    """On a rank: one run after the other."""
    for config in configs:
        pretrain(config)


def pretrain_with_a_shard_that_goes_bad(configs: list[RunConfig]) -> None:
    """On a rank: the last rank of all cannot read the shard when it comes to a step."""
    real = TrainingBatches.__getitem__

    def read(self: TrainingBatches, item: int):
        is_last_rank = self._plan._rank == self._plan._world_size - 1
        is_lost = self.corpus.is_lost(np.flatnonzero(self.corpus.series_shards == BAD))
        if is_last_rank and item == FOUND_AT and is_lost is None:
            raise ShardError("the disk has a scratch", shard=BAD)
        return real(self, item)

    with mock.patch.object(TrainingBatches, "__getitem__", read):
        pretrain_all(configs)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_damaged_shard_stops_the_run_with_a_way_out(corpus, tmp_path, capsys, damage) -> None:
    path = shard_file(corpus)
    reason = damage(path)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"corpus": str(corpus), "run": str(tmp_path / "run")}))
    assert main(["pretrain", str(config), "training.device=cpu"]) == 3
    message = capsys.readouterr().err
    assert path.name in message
    assert reason in message
    assert "set data.on_bad_shard=quarantine" in message


def test_damaged_shard_in_quarantine_is_left_out_by_any_ranks_and_every_resume(
    corpus, tmp_path
) -> None:
    def config(name: str, *layers: Settings) -> RunConfig:
        return small_config(corpus, QUARANTINE, {"run": str(tmp_path / name)}, *layers)

    path = shard_file(corpus)
    whole = path.read_bytes()
    single = {"training": {"micro_batch_size": 16}}
    run_on_ranks(pretrain_all, [config("undisturbed", single)], num_ranks=1)
    assert not (tmp_path / "undisturbed" / "quarantine.json").exists()
    for name, damage in (("truncated", truncate), ("flipped", flip_a_bit)):
        reason = damage(path)
        run_on_ranks(pretrain_all, [config(name)])
        (entry,) = listed(tmp_path / name)
        assert (entry["file"], entry["step"]) == (path.name, 0)
        assert reason in entry["reason"]
        path.write_bytes(whole)
    losses = recorded(tmp_path / "truncated")
    assert recorded(tmp_path / "flipped") == losses
    # Another number of ranks, on a whole corpus again: what was listed stays left out.
    run = tmp_path / "resumed"
    shutil.copytree(tmp_path / "truncated", run)
    for step in (4, 6):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08}")
    (run / "checkpoints" / "latest").write_text("step_00000002")
    run_on_ranks(pretrain_all, [config("resumed", single)], num_ranks=1)
    assert recorded(run) == pytest.approx(losses, rel=2e-6)
    assert recorded(tmp_path / "undisturbed") != pytest.approx(losses, rel=1e-4)


def test_shard_that_one_rank_cannot_read_is_left_out_by_all_from_that_step_on(
    corpus, tmp_path
) -> None:
    def config(name: str, *layers: Settings) -> RunConfig:
        return small_config(corpus, QUARANTINE, {"run": str(tmp_path / name)}, *layers)

    single = {"training": {"micro_batch_size": 16}}
    # Read ahead too: what was cut before the shard went bad is cut again.
    ahead = {"data": {"num_workers": 2}}
    run_on_ranks(pretrain_with_a_shard_that_goes_bad, [config("two"), config("ahead", ahead)])
    run_on_ranks(pretrain_with_a_shard_that_goes_bad, [config("one", single)], num_ranks=1)
    run_on_ranks(pretrain_all, [config("undisturbed", single)], num_ranks=1)
    one, undisturbed = recorded(tmp_path / "one"), recorded(tmp_path / "undisturbed")
    assert one[:FOUND_AT] == undisturbed[:FOUND_AT]
    assert one != pytest.approx(undisturbed, rel=1e-5)
    for name in ("two", "ahead"):
        assert recorded(tmp_path / name) == pytest.approx(one, rel=2e-6)
        (entry,) = listed(tmp_path / name)
        assert (entry["step"], entry["reason"]) == (FOUND_AT, "the disk has a scratch")
