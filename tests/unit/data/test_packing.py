"""Which short series share a window, and how such windows are cut."""

import itertools
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.packing import SeriesPacks
from tsmoe.data.permutation import order_key
from tsmoe.data.windows import WindowIndex, training_windows

WINDOW, PATCH = 24, 4
SLOTS = WINDOW // PATCH
KEY = order_key("fingerprint", 0)


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    """Two sources in several shards; one series is too short, three are as long as a window."""
    lengths = {
        "b": [8, 5, 4, 12, 16, 20, 9, 6, 7, 23, 24, 60, 13, 14, 8, 8, 11, 10, 5, 5],
        "a": [30, 12, 12, 12, 9],
    }
    missing = [(0, 6), (3, 0), (3, 1), (21, 11)]
    return make_corpus(lengths, train_fraction=1.0, missing=missing, shard_size_bytes=1500)


def index_of(corpus: Corpus) -> WindowIndex:
    return training_windows(corpus, window_length=WINDOW, patch_length=PATCH, stride=5)


def packs_of(corpus: Corpus, key: np.uint64 = KEY) -> SeriesPacks:
    return SeriesPacks.of(corpus, index_of(corpus), patch_length=PATCH, key=key)


def members(packs: SeriesPacks) -> list[list[int]]:
    edges = packs.first_member
    return [packs.members[a:b].tolist() for a, b in itertools.pairwise(edges)]


def all_windows(index: WindowIndex) -> tuple[np.ndarray, np.ndarray]:
    sources = np.repeat(np.arange(len(index.counts)), index.counts)
    numbers = np.concatenate([np.arange(count) for count in index.counts])
    _, series, starts = index.locate(sources, numbers)
    return series, starts


def slots_of(corpus: Corpus, pack: list[int]) -> int:
    return sum(-(-int(corpus.train_lengths[series]) // PATCH) for series in pack)


def test_every_short_series_is_in_one_pack_that_fits_a_window(corpus) -> None:
    packs = packs_of(corpus)
    lengths = corpus.train_lengths
    short = np.flatnonzero((lengths > PATCH) & (lengths < WINDOW)).tolist()
    assert sorted(series for pack in members(packs) for series in pack) == short
    assert len(members(packs)) < 0.6 * len(short)
    assert all(0 < slots_of(corpus, pack) <= SLOTS for pack in members(packs))


def test_a_pack_is_of_one_source_and_one_shard(corpus) -> None:
    assert len(set(corpus.series_shards.tolist())) > 1
    for pack in members(packs_of(corpus)):
        assert len(set(corpus.source_ids[pack].tolist())) == 1
        assert len(set(corpus.series_shards[pack].tolist())) == 1


def test_a_pack_is_one_window_and_long_series_keep_theirs(corpus) -> None:
    plain, packs = index_of(corpus), packs_of(corpus)
    series, starts = all_windows(packs.index)
    found, is_pack = packs.find(series)
    assert Counter(found[is_pack].tolist()) == Counter(range(len(packs.heads)))
    assert packs.heads.tolist() == [min(pack) for pack in members(packs)]
    plain_series, plain_starts = all_windows(plain)
    is_long = corpus.train_lengths[plain_series] >= WINDOW
    assert series[~is_pack].tolist() == plain_series[is_long].tolist()
    assert starts[~is_pack].tolist() == plain_starts[is_long].tolist()
    # What shares of sources are made of stays, so that packing moves no share.
    assert packs.index.points.tolist() == plain.points.tolist()
    assert packs.index.unusable_series == plain.unusable_series
    assert packs.index.num_windows == is_long.sum() + len(packs.heads) < plain.num_windows


def test_windows_of_an_index_with_packs_are_sorted_by_source_and_shard(corpus) -> None:
    # Blocks of shards are cut out of the numbering.
    series = packs_of(corpus).index.series
    places = list(zip(corpus.source_ids[series], corpus.series_shards[series], strict=True))
    assert places == sorted(places)


def test_packs_are_a_function_of_the_corpus_and_the_key(corpus) -> None:
    assert members(packs_of(corpus)) == members(packs_of(corpus))
    assert members(packs_of(corpus)) != members(packs_of(corpus, order_key("fingerprint", 1)))


def test_without_short_series_nothing_is_packed(make_corpus) -> None:
    corpus = make_corpus({"a": [40, 24]}, train_fraction=1.0)
    packs = packs_of(corpus)
    assert not len(packs.heads)
    series, _ = all_windows(packs.index)
    assert not packs.find(series)[1].any()
    assert packs.index.num_windows == index_of(corpus).num_windows


def test_packs_waste_little_of_a_million_series_and_take_no_time() -> None:
    generator = np.random.default_rng(0)
    count, window, patch = 1_000_000, 2976, 96
    ends = generator.integers(97, 2976, count)
    corpus = SimpleNamespace(
        source_ids=np.sort(generator.integers(0, 5, count)).astype(np.int32),
        series_shards=np.sort(generator.integers(0, 40, count)).astype(np.int32),
        sources=["abcde"[i] for i in range(5)],
        manifest=SimpleNamespace(shards=[None] * 40),
    )
    series = np.arange(count, dtype=np.int32)
    counts = np.bincount(corpus.source_ids)
    index = WindowIndex(
        series=series, begins=None, ends=ends, first_window=series.astype(np.int64), counts=counts,
        points=counts, unusable_series=0, window_length=window, stride=1, is_validation=False,
    )  # fmt: skip
    begun = time.process_time()
    packs = SeriesPacks.of(corpus, index, patch_length=patch, key=KEY)
    assert time.process_time() - begun < 10, "measured: 1 s"
    needed = int((-(-ends // patch)).sum())
    assert len(packs.heads) < 1.01 * needed / (window // patch)


def cut_all(corpus: Corpus, stride: int) -> tuple[SeriesPacks, np.ndarray, WindowBatch]:
    gather = PackGather(corpus, index_of(corpus), seed=3, patch_length=PATCH, patch_stride=stride)
    series, starts = all_windows(gather.packs.index)
    return gather.packs, series, gather.cut(series, starts)


@pytest.mark.parametrize("stride", [4, 2, 1])
def test_a_pack_holds_all_of_its_series_each_at_the_end_of_whole_patches(corpus, stride) -> None:
    packs, series, batch = cut_all(corpus, stride)
    assert batch.values_BCL.shape == (len(series), 1, WINDOW)
    assert batch.series_ids_B.tolist() == series.tolist()
    for row, (pack, is_pack) in enumerate(zip(*packs.find(series), strict=True)):
        if not is_pack:
            continue
        values_L, observed_L = batch.values_BCL[row, 0], batch.observed_BCL[row, 0]
        expected_L = np.full(WINDOW, np.nan, dtype=np.float32)
        end = WINDOW
        for member in reversed(members(packs)[pack]):
            recorded = corpus.series(member)
            expected_L[end - len(recorded) : end] = recorded
            end -= -(-len(recorded) // PATCH) * PATCH
        assert np.array_equal(observed_L.numpy(), ~np.isnan(expected_L))
        assert np.array_equal(values_L.numpy(), np.nan_to_num(expected_L))


@pytest.mark.parametrize("stride", [4, 2])
def test_windows_of_long_series_among_packs_are_cut_as_ever(corpus, stride: int) -> None:
    packs, series, batch = cut_all(corpus, stride)
    _, starts = all_windows(packs.index)
    is_pack = packs.find(series)[1]
    assert (~is_pack).sum() > 5
    for row in np.flatnonzero(~is_pack):
        recorded = corpus.series(int(series[row]))[starts[row] : starts[row] + WINDOW]
        assert np.array_equal(batch.values_BCL[row, 0].numpy(), np.nan_to_num(recorded))
        assert np.array_equal(batch.observed_BCL[row, 0].numpy(), ~np.isnan(recorded))
        assert (batch.series_BCN[row] == series[row]).all()
        # The first patch of a window is no target: nothing comes before it.
        assert torch.equal(batch.is_target_BCL[row, 0, PATCH:], batch.observed_BCL[row, 0, PATCH:])
        assert not batch.is_target_BCL[row, 0, :PATCH].any()


def tokens_alone(length: int, stride: int) -> int:
    """Tokens that the model makes of a series without the patch that it forecasts last."""
    return max(0, -(-(length - 2 * PATCH) // stride)) + 1


@pytest.mark.parametrize("stride", [4, 2, 1])
def test_tokens_and_targets_are_those_of_the_series_alone(corpus, stride: int) -> None:
    packs, series, batch = cut_all(corpus, stride)
    assert batch.series_BCN.shape[-1] == (WINDOW - 2 * PATCH) // stride + 1
    for row, (pack, is_pack) in enumerate(zip(*packs.find(series), strict=True)):
        if not is_pack:
            continue
        counts = Counter(batch.series_BCN[row, 0].tolist())
        counts.pop(-1, None)
        assert counts == {
            member: tokens_alone(len(corpus.series(member)), stride)
            for member in members(packs)[pack]
        }
        end = WINDOW
        for member in reversed(members(packs)[pack]):
            length = len(corpus.series(member))
            tokens = (batch.series_BCN[row, 0] == member).nonzero()[:, 0]
            # The last token ends a patch before the series does.
            assert int(tokens[-1]) * stride + 2 * PATCH == end
            first_target = int(tokens[0]) * stride + PATCH
            begin = end - -(-length // PATCH) * PATCH
            assert not batch.is_target_BCL[row, 0, begin:first_target].any()
            assert torch.equal(
                batch.is_target_BCL[row, 0, first_target:end],
                batch.observed_BCL[row, 0, first_target:end],
            )
            end = begin
        assert not batch.is_target_BCL[row, 0, :end].any()


def test_of_a_window_of_one_short_series_the_fill_is_no_token(corpus) -> None:
    for stride in (4, 2):
        gather = PackGather(
            corpus, index_of(corpus), seed=0, patch_length=PATCH, patch_stride=stride
        )
        lengths = np.array([24, 30, 23, 17, 16, 9, 8, 5, 2])
        tokens = gather.tokens_alone(np.arange(9), lengths - WINDOW)
        assert tokens.shape == (9, 1, (WINDOW - 2 * PATCH) // stride + 1)
        for series, length in enumerate(lengths):
            is_token = tokens[series, 0] == series
            assert int(is_token.sum()) == tokens_alone(min(length, WINDOW), stride)
            assert is_token.tolist() == sorted(is_token.tolist()), "the last ones"
