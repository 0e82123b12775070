"""What a run sees of a corpus with a bad shard."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.build import build_corpus
from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ShardError
from data_pipeline.shards.reader import Corpus
from data_pipeline.sources.csv import CsvSource
from tsmoe.data.gather import WindowGather
from tsmoe.data.loader import DataConfig, TrainingBatches
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.quarantine import Quarantine
from tsmoe.data.windows import training_windows
from tsmoe.errors import DataError
from tsmoe.ranks import Ranks

LENGTHS = {"window_length": 64, "patch_length": 16}
NUM_SERIES, NUM_POINTS, BAD = 24, 512, 5


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Build a corpus of a dozen shards, with a short series here and there."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    for number in range(NUM_SERIES):
        length = 40 if number % 8 == 3 else NUM_POINTS
        values = generator.normal(size=length).cumsum()
        rows = "".join(f"{value:.6g}\n" for value in values)
        (folder / f"s{number:02}.csv").write_text(f"value\n{rows}")
    source = CsvSource(path=str(folder / "*.csv"), source="walks")
    build_corpus(CorpusConfig(sources=[source], shard_size_bytes=4096), folder / "corpus")
    return folder / "corpus"


@pytest.fixture
def corpus(made) -> Corpus:
    return Corpus.open(made)


def batches(corpus: Corpus, *, packs: bool = False, **settings: object) -> TrainingBatches:
    index = training_windows(corpus, stride=1, **LENGTHS)
    gather = None
    if packs:
        gather = PackGather(corpus, index, seed=0, patch_length=16, patch_stride=16)
    return TrainingBatches(
        corpus,
        index,
        DataConfig(packs_short_series=packs, **settings),
        seed=0,
        packs=gather,
        global_batch_size=32,
        micro_batch_size=32,
        ranks=Ranks(),
    )


def test_corpus_has_more_than_ten_shards(corpus) -> None:
    assert len(corpus.manifest.shards) > 10


@pytest.mark.parametrize("is_lost_late", [False, True])
def test_other_windows_are_as_ever_and_lost_ones_were_not_observed(
    made, corpus, is_lost_late
) -> None:
    whole, partly = batches(Corpus.open(made)), batches(corpus)
    if is_lost_late:  # after windows were drawn, and found in memory
        partly[0]
    corpus.lose([BAD])
    num_lost = 0
    for item in range(8):
        before, after = whole[item], partly[item]
        assert torch.equal(before.series_ids_B, after.series_ids_B)
        is_lost = torch.from_numpy(corpus.series_shards[after.series_ids_B.numpy()] == BAD)
        num_lost += int(is_lost.sum())
        for name in ("values_BCL", "observed_BCL", "is_target_BCL"):
            assert torch.equal(getattr(before, name)[~is_lost], getattr(after, name)[~is_lost])
            assert not getattr(after, name)[is_lost].any()
    assert num_lost


def test_packed_and_mixed_windows_lose_what_is_of_the_shard(made, corpus) -> None:
    for settings in ({"packs": True}, {"mixup_share": 1.0}):
        whole, partly = batches(Corpus.open(made), **settings), batches(corpus, **settings)
        corpus.lose([BAD])
        for item in range(8):
            before, after = whole[item], partly[item]
            assert after.values_BCL.isfinite().all()
            assert not (after.observed_BCL & ~before.observed_BCL).any()
            if after.series_BCN is not None:
                series_BCN = after.series_BCN.clamp(min=0).numpy()
                is_lost_BCN = torch.from_numpy(corpus.series_shards[series_BCN] == BAD)
                is_lost_BCN &= after.series_BCN >= 0
                is_lost_BCL = is_lost_BCN.repeat_interleave(16, -1)
                seen_BCL = after.observed_BCL[..., : is_lost_BCL.shape[-1]]
                assert not (seen_BCL & is_lost_BCL).any()


def test_lost_shard_is_never_opened(made, corpus, monkeypatch) -> None:
    opened = []
    real = type(corpus._batches)._get

    def get(self, number: int):
        opened.append(number)
        return real(self, number)

    monkeypatch.setattr(type(corpus._batches), "_get", get)
    corpus.lose([BAD])
    of_bad = np.flatnonzero(corpus.series_shards == BAD)
    gather = WindowGather(corpus, 64)
    gather.cut(gather.place(np.append(of_bad, 0), np.zeros(len(of_bad) + 1, np.int64)))
    assert opened == [0]
    assert corpus.item_id(int(of_bad[0])) == f"series {of_bad[0]} of a lost shard"


def test_damaged_shard_is_told_by_its_number(made, tmp_path) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    for file in made.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    name = f"part-{BAD:05}.arrow"
    (copy / name).write_bytes(bytes((made / name).stat().st_size))
    corpus = Corpus.open(copy)
    with pytest.raises(ShardError, match=rf"{name}.*cannot be read") as raised:
        corpus.shard(BAD)
    assert raised.value.shard == BAD


def test_quarantine_is_listed_and_known_again(made, corpus, tmp_path, caplog) -> None:
    path = tmp_path / "run" / "quarantine.json"
    quarantine = Quarantine(corpus, path, Ranks())
    assert not quarantine.agree(None, step=3)
    assert not path.exists()
    assert quarantine.agree(ShardError("it is broken", shard=BAD), step=3)
    (entry,) = json.loads(path.read_text())["shards"]
    assert (entry["shard"], entry["step"], entry["reason"]) == (BAD, 3, "it is broken")
    assert entry["file"] == corpus.manifest.shards[BAD].file
    assert "shard 5 goes into quarantine: it is broken" in caplog.text
    other = Corpus.open(made)
    Quarantine(other, path, Ranks())
    assert other.is_lost(np.arange(NUM_SERIES)).sum() == corpus.manifest.shards[BAD].rows
    assert "going on without 1 shards" in caplog.text


def test_more_than_a_tenth_of_the_points_is_too_much(corpus, tmp_path) -> None:
    quarantine = Quarantine(corpus, tmp_path / "quarantine.json", Ranks())
    quarantine.agree(ShardError("one", shard=BAD), step=0)
    quarantine.agree(ShardError("two", shard=BAD + 1), step=0)
    assert quarantine.lost_share < 0.1
    with pytest.raises(DataError, match=r"3 shards .* lost, more than 10%: one; two; three"):
        quarantine.agree(ShardError("three", shard=BAD + 2), step=0)


def test_damage_to_the_index_is_no_matter_of_quarantine(corpus, tmp_path) -> None:
    quarantine = Quarantine(corpus, tmp_path / "quarantine.json", Ranks())
    with pytest.raises(DataError, match="the index is wrong"):
        quarantine.add_files({corpus.manifest.index.file: "the index is wrong"}, step=0)
