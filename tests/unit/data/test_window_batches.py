from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
import torch

from data_pipeline.shards import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.loader import DataConfig, TrainingBatches, ValidationBatches, load_training
from tsmoe.data.windows import training_windows, validation_windows
from tsmoe.ranks import Ranks

WINDOW, PATCH = 24, 4
CONFIG_FIELDS = {field.name for field in fields(DataConfig)}
SIZES = {"window_length": WINDOW, "patch_length": PATCH}


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    lengths = {"b": [100, 61, 9, 40] * 3, "a": [24, 32, 5, 250, 8]}
    return make_corpus(lengths, missing=[(0, 3), (0, 95), (5, 7), (15, 30)])


def training(
    corpus: Corpus, *, rank: int = 0, size: int = 1, **settings: object
) -> TrainingBatches:
    defaults = {"seed": 0, "micro_batch_size": 4, "global_batch_size": 12}
    of_config = {name: settings.pop(name) for name in list(settings) if name in CONFIG_FIELDS}
    return TrainingBatches(
        corpus,
        training_windows(corpus, **SIZES, stride=1),
        DataConfig(**of_config),
        ranks=Ranks(rank=rank, size=size),
        **(defaults | settings),
    )


def validation(
    corpus: Corpus, *, rank: int = 0, size: int = 1, **settings: int
) -> ValidationBatches:
    return ValidationBatches(
        corpus,
        validation_windows(corpus, **SIZES),
        ranks=Ranks(rank=rank, size=size),
        **({"max_windows": 1000, "batch_size": 4} | settings),
    )


def contents(*batches: WindowBatch) -> list[tuple]:
    """Every window as its series, values and mask of targets."""
    return [
        (int(series), tuple(values.tolist()), tuple(is_target.tolist()))
        for batch in batches
        for series, values, is_target in zip(
            batch.series_ids_B, batch.values_BCL[:, 0], batch.is_target_BCL[:, 0], strict=True
        )
    ]


def assert_same(first: WindowBatch, second: WindowBatch) -> None:
    for name, tensor in vars(first).items():
        other = vars(second)[name]
        assert tensor is other is None or torch.equal(tensor, other), name


def test_batch_holds_the_series_points_and_marks_what_is_missing(corpus) -> None:
    batches = [training(corpus)[item] for item in range(50)]
    seen_missing = seen_padding = False
    for batch in batches:
        assert batch.values_BCL.shape == (4, 1, WINDOW)
        assert batch.values_BCL.dtype == torch.float32
        assert batch.num_windows == 4
        for row, series in enumerate(batch.series_ids_B.tolist()):
            values, observed = batch.values_BCL[row, 0], batch.observed_BCL[row, 0]
            places = (values - 10_000 * series)[observed].long()
            recorded = corpus.series(series)[places.numpy()]
            assert np.array_equal(recorded, values[observed].numpy())
            assert places.max() < corpus.train_lengths[series]
            assert (values[~observed] == 0).all()
            inside = observed.nonzero()[:, 0]
            seen_padding |= bool(inside[0] > 1)
            seen_missing |= bool((~observed[inside[0] : inside[-1]]).any())
    assert seen_missing
    assert seen_padding


def test_every_observed_point_of_a_training_window_may_be_a_target(corpus) -> None:
    batch = training(corpus)[3]
    assert torch.equal(batch.is_target_BCL, batch.observed_BCL)


@pytest.mark.parametrize(("size", "micro_batch_size"), [(2, 6), (3, 4), (4, 3), (1, 3)])
def test_a_step_holds_the_same_windows_on_any_number_of_ranks(
    corpus, size: int, micro_batch_size: int
) -> None:
    alone = training(corpus, micro_batch_size=12)
    passes = 12 // (size * micro_batch_size)
    for step in range(5):
        items = range(step * passes, (step + 1) * passes)
        by_pass_and_rank = [
            training(corpus, rank=rank, size=size, micro_batch_size=micro_batch_size)[item]
            for item in items
            for rank in range(size)
        ]
        assert contents(*by_pass_and_rank) == contents(alone[step])


@pytest.mark.parametrize("mixup_share", [0.0, 0.5])
def test_run_goes_on_where_it_was_interrupted(corpus, mixup_share: float) -> None:
    whole = training(corpus, mixup_share=mixup_share)
    resumed = training(corpus, first_window=5 * 4, mixup_share=mixup_share)
    for item in range(4):
        assert_same(resumed[item], whole[5 + item])
    assert contents(whole[0]) != contents(whole[5])


def test_share_of_the_windows_is_mixed_with_others(corpus) -> None:
    plain, mixed = training(corpus), training(corpus, mixup_share=0.5)
    pairs = [
        (ours[0], theirs[0])
        for item in range(50)
        for ours, theirs in zip(mixed[item].values_BCL, plain[item].values_BCL, strict=True)
    ]
    unchanged = sum(torch.equal(ours, theirs) for ours, theirs in pairs)
    # 200 windows: half of them within 5 standard errors.
    assert 65 < unchanged < 135


def test_resume_with_more_ranks_goes_on_in_the_same_order(corpus) -> None:
    rest = [training(corpus, rank=rank, size=2, first_window=12)[0] for rank in range(2)]
    whole = training(corpus)
    assert contents(*rest) == contents(whole[3], whole[4])


def test_another_seed_gives_other_windows(corpus) -> None:
    assert contents(training(corpus)[0]) != contents(training(corpus, seed=1)[0])


def test_another_corpus_gives_another_order(make_corpus) -> None:
    # As many windows in both, so that only the fingerprint tells them apart.
    first, second = (make_corpus({"a": [60] * 30}, missing=gaps) for gaps in ([], [(0, 59)]))
    assert not torch.equal(training(first)[0].series_ids_B, training(second)[0].series_ids_B)


def test_worker_process_cuts_the_same_batches(corpus) -> None:
    in_process, by_worker = (
        list(
            load_training(training(corpus), num_batches=6, num_workers=workers, timeout_seconds=30)
        )
        for workers in (0, 1)
    )
    assert len(in_process) == len(by_worker) == 6
    for first, second in zip(in_process, by_worker, strict=True):
        assert_same(first, second)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_out_every_validation_window_once(corpus, size: int) -> None:
    by_rank = [validation(corpus, rank=rank, size=size) for rank in range(size)]
    assert len({len(batches) for batches in by_rank}) == 1
    total = validation_windows(corpus, **SIZES).num_windows
    assert total % (4 * size), "the last batches are not full"
    windows = [
        window
        for batches in by_rank
        for item in range(len(batches))
        for window in contents(batches[item])
        if any(window[2])
    ]
    targets = Counter(
        (series, value)
        for series, values, is_target in windows
        for value, counts in zip(values[PATCH:], is_target[PATCH:], strict=True)
        if counts
    )
    expected = {
        (series, float(value))
        for series in range(corpus.num_series)
        for value in corpus.series(series)[corpus.train_lengths[series] :]
        if not np.isnan(value)
    }
    assert set(targets) == expected
    assert set(targets.values()) == {1}


def test_nothing_before_the_split_is_a_validation_target(corpus) -> None:
    batches = validation(corpus)
    has_context = False
    for item in range(len(batches)):
        batch = batches[item]
        for row, series in enumerate(batch.series_ids_B.tolist()):
            is_target = batch.is_target_BCL[row, 0]
            values = batch.values_BCL[row, 0] - 10_000 * series
            assert (values[is_target] >= corpus.train_lengths[series]).all()
            assert batch.observed_BCL[row, 0][is_target].all()
            has_context |= bool((batch.observed_BCL[row, 0] & ~is_target).any())
    assert has_context


def test_some_of_many_validation_windows_are_evenly_spaced(corpus) -> None:
    total = validation_windows(corpus, **SIZES).num_windows
    few = validation(corpus, max_windows=5)
    assert few.windows.tolist() == [number * total // 5 for number in range(5)]
    assert len(few) == 2


def test_validation_ends_after_its_last_batch(corpus) -> None:
    batches = validation(corpus)
    with pytest.raises(IndexError):
        batches[len(batches)]
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"window_stride": 0}, r"window_stride \(0\)"),
        ({"max_validation_windows": 0}, r"max_validation_windows \(0\)"),
        ({"num_workers": -1}, r"num_workers \(-1\)"),
        ({"source_temperature": 1.5}, r"source_temperature \(1\.5\)"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(**settings)
