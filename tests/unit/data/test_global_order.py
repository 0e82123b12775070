"""The order of windows over ranks, workers, restarts, phases and splits, on whole batches."""

import numpy as np
import pytest

from data_pipeline.shards import Corpus
from tsmoe.data import plan
from tsmoe.data.loader import DataConfig, TrainingBatches, ValidationBatches, load_training
from tsmoe.data.mixing import CurriculumPhase
from tsmoe.data.windows import training_windows, validation_windows
from tsmoe.errors import ConfigError
from tsmoe.ranks import Ranks

WINDOW, PATCH = 24, 4
SIZES = {"window_length": WINDOW, "patch_length": PATCH}
STEP = 24  # windows: of 1, 2, 3 and 4 ranks with micro-batches of 6, 3 or 2
LENGTHS = {"a": [24, 32, 5, 250, 8], "b": [100, 61, 9, 40] * 3, "c": [500]}
DOMAINS = {"a": "A", "b": "B", "c": "B"}

CONFIGS = {
    "default": DataConfig(),
    "mixed": DataConfig(mixup_share=0.5),
    "weights and caps": DataConfig(source_weights={"a": 3.0}, domain_caps={"B": 0.5}),
    "curriculum": DataConfig(
        curriculum=(
            CurriculumPhase(from_step=3, source_weights={"c": 0.0}),
            CurriculumPhase(from_step=5, source_temperature=1.0, domain_caps={"A": 0.1}),
        )
    ),
    "two shards at a time": DataConfig(resident_shards=2),
}


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw for a few batches at once, of some epochs of this corpus instead of thousands."""
    monkeypatch.setattr(plan, "_WINDOWS_AT_A_TIME", 60)


@pytest.fixture
def corpus(make_corpus) -> Corpus:
    return make_corpus(LENGTHS, missing=[(0, 3), (5, 7)], domains=DOMAINS, shard_size_bytes=1000)


def batches(
    corpus: Corpus, config: DataConfig, *, rank: int = 0, size: int = 1, micro: int, first: int = 0
) -> TrainingBatches:
    return TrainingBatches(
        corpus,
        training_windows(corpus, **SIZES, stride=1),
        config,
        seed=0,
        global_batch_size=STEP,
        micro_batch_size=micro,
        ranks=Ranks(rank=rank, size=size),
        first_window=first,
    )


def run(
    corpus: Corpus, config: DataConfig, *, size: int, micro: int, workers: int, steps: range
) -> list[tuple]:
    """All windows of some steps in the global order, as their series, values and masks."""
    passes = STEP // (size * micro)
    by_rank = [
        list(
            load_training(
                batches(
                    corpus, config, rank=rank, size=size, micro=micro, first=steps.start * STEP
                ),
                num_batches=len(steps) * passes,
                num_workers=workers,
                timeout_seconds=30,
            )
        )
        for rank in range(size)
    ]
    return [
        (int(series), tuple(values.tolist()), tuple(observed.tolist()))
        for number in range(len(steps) * passes)
        for rank in range(size)
        for series, values, observed in zip(
            by_rank[rank][number].series_ids_B,
            by_rank[rank][number].values_BCL[:, 0],
            by_rank[rank][number].observed_BCL[:, 0],
            strict=True,
        )
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("size", "micro"), [(1, 6), (2, 6), (3, 2), (4, 3)])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_global_order_is_that_of_one_process(corpus, name, size, micro, workers) -> None:
    steps = range(7)
    alone = run(corpus, CONFIGS[name], size=1, micro=STEP, workers=0, steps=steps)
    assert len(set(alone)) > 50
    assert run(corpus, CONFIGS[name], size=size, micro=micro, workers=workers, steps=steps) == alone


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", range(1, 7))
def test_run_goes_on_at_any_step_with_any_number_of_ranks(corpus, name, step) -> None:
    whole = run(corpus, CONFIGS[name], size=2, micro=3, workers=0, steps=range(7))
    rest = run(corpus, CONFIGS[name], size=3, micro=4, workers=1, steps=range(step, 7))
    assert rest == whole[step * STEP :]


def test_curriculum_begins_at_its_steps(corpus) -> None:
    config = CONFIGS["curriculum"]
    ours = batches(corpus, config, micro=STEP)
    of_c = [ours.source_shares(s * STEP, (s + 1) * STEP)["c"] for s in range(7)]
    assert of_c[3] == of_c[4] == 0
    assert all(of_c[step] > 0 for step in (0, 1, 2, 5, 6))
    c = corpus.sources.index("c")
    for step in range(7):
        seen = (corpus.source_ids[ours[step].series_ids_B.numpy()] == c).mean()
        assert seen == of_c[step]


def test_windows_come_from_as_many_shards_at_a_time_as_were_asked_for(corpus) -> None:
    ours = batches(corpus, DataConfig(resident_shards=1), micro=STEP)
    _, series = zip(*(ours._plan[i] for i in range(20)), strict=True)
    series_ids = np.concatenate([windows.series for windows in series])
    of_b = series_ids[corpus.source_ids[series_ids] == corpus.sources.index("b")]
    shards = corpus.series_shards[of_b]
    changes = (np.diff(shards) != 0).sum()
    assert len(np.unique(shards)) > 2
    # One shard at a time: as many changes as shards in an epoch, give or take the epochs' ends.
    windows_of_b = int(ours.index.counts[corpus.sources.index("b")])
    assert changes <= (len(of_b) / windows_of_b + 1) * len(np.unique(shards))


def test_cache_that_is_too_small_is_named(corpus, monkeypatch) -> None:
    assert batches(corpus, DataConfig(), micro=STEP).cache_problem() is None
    monkeypatch.setattr(corpus, "max_resident_shards", 3)
    all_shards = batches(corpus, DataConfig(), micro=STEP).cache_problem()
    assert f"from {len(corpus.manifest.shards)} shards at a time, but" in all_shards
    assert "the cache holds 3" in all_shards
    assert "set data.resident_shards" in all_shards
    # Three sources, one shard each, and the next of each.
    few = DataConfig(resident_shards=1)
    assert "from 6 shards at a time" in batches(corpus, few, micro=STEP).cache_problem()
    monkeypatch.setattr(corpus, "max_resident_shards", 6)
    assert batches(corpus, few, micro=STEP).cache_problem() is None
    mixed = DataConfig(resident_shards=1, mixup_share=0.5)
    assert "from 12 shards at a time" in batches(corpus, mixed, micro=STEP).cache_problem()


def test_error_of_a_phase_names_it(corpus) -> None:
    phase = CurriculumPhase(from_step=3, source_weights={"x": 1.0})
    with pytest.raises(ConfigError, match=r"data\.curriculum \(from_step 3\)\.source_weights\.x"):
        batches(corpus, DataConfig(curriculum=(phase,)), micro=STEP)


def test_validation_needs_no_more_shards_than_are_resident(corpus) -> None:
    index = validation_windows(corpus, **SIZES)
    for resident, most in ((1, 3), (2, 6)):
        ours = ValidationBatches(
            corpus, index, max_windows=100, batch_size=8, ranks=Ranks(), resident_shards=resident
        )
        series = np.concatenate([ours[i].series_ids_B.numpy() for i in range(len(ours))])
        found = {(corpus.source_ids[s], corpus.series_shards[s]) for s in series}
        assert 0 < len(found) <= most
        assert {source for source, _ in found} == {0, 1, 2}


@pytest.mark.parametrize("seed", range(12))
def test_no_training_window_holds_a_point_that_validation_looks_at(make_corpus, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = {
        name: generator.integers(1, 200, generator.integers(1, 9)).tolist() for name in "abc"
    }
    lengths["c"].append(150)
    count = sum(map(len, lengths.values()))
    held_out = np.flatnonzero(generator.random(count - 1) < 0.3).tolist()
    corpus = make_corpus(
        lengths,
        train_fraction=float(generator.choice([0.5, 0.8, 0.9, 0.95])),
        held_out=held_out,
    )
    patch = int(generator.integers(1, 9))
    window = patch * int(generator.integers(2, 9))
    sizes = {"window_length": window, "patch_length": patch}
    training = training_windows(corpus, **sizes, stride=int(generator.integers(1, 40)))
    validation = validation_windows(corpus, **sizes)
    trained: set[tuple[int, int]] = set()
    for series, start in windows_of(training):
        trained |= {(series, place) for place in range(max(start, 0), start + window)}
    looked_at = [
        (series, place)
        for series, start in windows_of(validation)
        for place in range(max(start, int(corpus.train_lengths[series])), start + window)
    ]
    assert trained.isdisjoint(looked_at)
    assert trained
    assert looked_at
    assert not {series for series, _ in trained} & set(held_out)
    seen_once = [p for p in looked_at if corpus.train_lengths[p[0]] > 0]
    # Where a window has no token before its first patch, two windows share that patch.
    assert len(set(looked_at)) == len({*seen_once, *looked_at})


def windows_of(index) -> list[tuple[int, int]]:
    found = []
    for source, count in enumerate(index.counts):
        _, series, starts = index.locate(np.full(count, source), np.arange(count))
        found += list(zip(series.tolist(), starts.tolist(), strict=True))
    return found


@pytest.mark.parametrize("stride", [1, 7])
def test_every_window_comes_once_an_epoch(corpus, stride: int) -> None:
    index = training_windows(corpus, **SIZES, stride=stride)
    for config in (DataConfig(), DataConfig(resident_shards=1)):
        ours = TrainingBatches(
            corpus, index, config, seed=1, global_batch_size=64, micro_batch_size=64,
            ranks=Ranks(),
        )  # fmt: skip
        drawn = [ours._plan[item][1] for item in range(2000)]
        series = np.concatenate([windows.series for windows in drawn])
        starts = np.concatenate([windows.starts for windows in drawn])
        source = corpus.source_ids[series]
        for number, count in enumerate(index.counts):
            of_source = np.stack((series, starts), axis=1)[source == number]
            assert len(of_source) > 2 * count
            for epoch in (of_source[:count], of_source[count : 2 * count]):
                assert len(np.unique(epoch, axis=0)) == count
