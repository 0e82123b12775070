"""Training batches in which short series share windows."""

from collections import Counter

import pytest
import torch

from data_pipeline.shards import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.loader import DataConfig, TrainingBatches, ValidationBatches
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.windows import training_windows, validation_windows
from tsmoe.ranks import Ranks

WINDOW, PATCH = 24, 4


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    """A source of short and long series, and one of long series only."""
    lengths = {"a": [30, 26], "b": [8, 5, 12, 16, 20, 9, 6, 7, 23, 25, 13, 14, 8, 8]}
    return make_corpus(lengths, train_fraction=1.0)


def training(
    corpus: Corpus,
    *,
    rank: int = 0,
    size: int = 1,
    packs: bool = True,
    seed: int = 0,
    micro_batch_size: int = 4,
    config: DataConfig | None = None,
    **settings: object,
) -> TrainingBatches:
    index = training_windows(corpus, window_length=WINDOW, patch_length=PATCH, stride=1)
    gather = PackGather(corpus, index, seed=seed, patch_length=PATCH, patch_stride=PATCH)
    return TrainingBatches(
        corpus,
        index,
        config or DataConfig(),
        seed=seed,
        packs=gather if packs else None,
        micro_batch_size=micro_batch_size,
        global_batch_size=12,
        ranks=Ranks(rank=rank, size=size),
        **settings,
    )


def contents(*batches: WindowBatch) -> list[tuple]:
    """Every window as its values, what is observed, and the series of its tokens."""
    found = []
    for batch in batches:
        series_BCN = batch.series_BCN
        if series_BCN is None:
            tokens = (WINDOW - PATCH) // PATCH
            series_BCN = batch.series_ids_B[:, None, None].expand(-1, 1, tokens)
        found += [
            (tuple(values.tolist()), tuple(observed.tolist()), tuple(series.tolist()))
            for values, observed, series in zip(
                batch.values_BCL[:, 0], batch.observed_BCL[:, 0], series_BCN[:, 0], strict=True
            )
        ]
    return found


def test_each_short_series_comes_once_an_epoch_in_a_pack(corpus) -> None:
    batches = training(corpus, micro_batch_size=1)
    epoch = int(batches.order.counts[1])
    seen: Counter[int] = Counter()
    item = 0
    while len(seen) == 0 or sum(batches.order.dealt(item)[1:]) < epoch:
        series = set(contents(batches[item])[0][2]) - {-1}
        seen.update(series)
        item += 1
    short = [s for s in range(corpus.num_series) if PATCH < corpus.train_lengths[s] < WINDOW]
    assert len(short) == 13
    assert [seen[series] for series in short] == [1] * 13


def test_shares_of_sources_stay_what_they_were(corpus) -> None:
    packed, plain = training(corpus), training(corpus, packs=False)
    assert packed.order.counts[1] < plain.order.counts[1]
    assert packed.order.dealt(65536).tolist() == plain.order.dealt(65536).tolist()


@pytest.mark.parametrize(("size", "micro_batch_size"), [(2, 6), (3, 4), (4, 3), (1, 3)])
def test_a_step_holds_the_same_windows_on_any_number_of_ranks(
    corpus, size: int, micro_batch_size: int
) -> None:
    mask = PatchMask(context_length=WINDOW - PATCH, patch_length=PATCH, lookahead_patches=3)
    alone = training(corpus, micro_batch_size=12, patch_mask=mask)
    passes = 12 // (size * micro_batch_size)
    for step in range(5):
        of_ranks = [
            training(
                corpus, rank=rank, size=size, micro_batch_size=micro_batch_size, patch_mask=mask
            )[item]
            for item in range(step * passes, (step + 1) * passes)
            for rank in range(size)
        ]
        assert contents(*of_ranks) == contents(alone[step])


def test_run_goes_on_where_it_was_interrupted(corpus) -> None:
    whole, resumed = training(corpus), training(corpus, first_window=5 * 4)
    for item in range(4):
        assert contents(resumed[item]) == contents(whole[5 + item])


def test_batch_without_a_pack_is_an_ordinary_one(corpus) -> None:
    only_long = DataConfig(source_weights={"b": 0.0})
    packed = training(corpus, config=only_long)[0]
    plain = training(corpus, config=only_long, packs=False)[0]
    assert packed.series_BCN is None
    assert contents(packed) == contents(plain)


def test_validation_sees_short_series_without_fill(make_corpus) -> None:
    corpus = make_corpus({"a": [40, 13, 12, 14]}, train_fraction=0.5)
    sizes = {"window_length": WINDOW, "patch_length": PATCH}
    index = training_windows(corpus, **sizes, stride=1)
    gather = PackGather(corpus, index, seed=0, patch_length=PATCH, patch_stride=PATCH)
    plain, packed = (
        ValidationBatches(
            corpus,
            validation_windows(corpus, **sizes),
            max_windows=10,
            batch_size=8,
            ranks=Ranks(),
            packs=packs,
        )[0]
        for packs in (None, gather)
    )
    assert torch.equal(plain.values_BCL, packed.values_BCL)
    assert torch.equal(plain.is_target_BCL, packed.is_target_BCL)
    assert plain.series_BCN is None
    is_token_BN = packed.series_BCN[:, 0] >= 0
    observed_BNP = packed.observed_BCL[:, 0, : WINDOW - PATCH].unflatten(-1, (-1, PATCH))
    assert torch.equal(is_token_BN, observed_BNP.any(-1))
    assert not is_token_BN.all()


def test_packs_are_others_for_another_seed(corpus) -> None:
    def packs(seed: int) -> set[frozenset[int]]:
        windows = contents(*(training(corpus, seed=seed)[item] for item in range(30)))
        return {frozenset(series) - {-1} for _, _, series in windows}

    assert packs(0) == packs(0)
    assert any(packs(0) != packs(seed) for seed in range(1, 6))


def test_first_patch_of_each_series_is_shown_and_others_are_hidden(corpus) -> None:
    mask = PatchMask(context_length=WINDOW - PATCH, patch_length=PATCH, lookahead_patches=2)
    hidden = shown = 0
    for item in range(40):
        plain, batch = training(corpus)[item], training(corpus, patch_mask=mask)[item]
        assert torch.equal(plain.is_target_BCL, batch.is_target_BCL)
        for row, (_, _, series) in enumerate(contents(plain)):
            for token, number in enumerate(series):
                patch = slice(token * PATCH, (token + 1) * PATCH)
                is_seen = bool(batch.observed_BCL[row, 0, patch].any())
                if number >= 0 and (token == 0 or series[token - 1] != number):
                    assert is_seen
                    shown += 1
                else:
                    hidden += bool(plain.observed_BCL[row, 0, patch].any()) and not is_seen
    assert hidden > 20
    assert shown > 100


def test_packs_and_mixed_windows_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"mixup_share \(0.2\) must be 0 where packs_short_series"):
        DataConfig(mixup_share=0.2, packs_short_series=True)
