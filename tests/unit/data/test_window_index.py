import numpy as np
import pytest

from data_pipeline.shards import Corpus
from tsmoe.data.windows import WindowIndex, training_windows, validation_windows
from tsmoe.errors import DataError

WINDOW, PATCH = 24, 4
LENGTHS = {"b": [100, 61, 9, 40], "a": [24, 32, 5, 250, 3], "c": [2]}


def all_windows(index: WindowIndex) -> list[tuple[int, int]]:
    """Series and start of every window, source by source."""
    found = []
    for source, count in enumerate(index.counts):
        sources = np.full(count, source)
        _, series, starts = index.locate(sources, np.arange(count))
        found += list(zip(series.tolist(), starts.tolist(), strict=True))
    return found


def training(corpus: Corpus, stride: int = 1) -> WindowIndex:
    return training_windows(corpus, window_length=WINDOW, patch_length=PATCH, stride=stride)


def validation(corpus: Corpus) -> WindowIndex:
    return validation_windows(corpus, window_length=WINDOW, patch_length=PATCH)


@pytest.mark.parametrize("stride", [1, 5, 24, 1000])
def test_training_windows_end_before_the_split(make_corpus, stride: int) -> None:
    corpus = make_corpus(LENGTHS)
    windows = all_windows(training(corpus, stride))
    assert windows
    for series, start in windows:
        assert start + WINDOW <= corpus.train_lengths[series]


@pytest.mark.parametrize("stride", [1, 5, 24])
def test_every_training_point_is_in_some_window(make_corpus, stride: int) -> None:
    corpus = make_corpus(LENGTHS)
    covered = {series: set() for series in range(corpus.num_series)}
    windows = all_windows(training(corpus, stride))
    assert len(windows) == len(set(windows)), "no window twice"
    for series, start in windows:
        covered[series] |= set(range(max(start, 0), start + WINDOW))
    for series, length in enumerate(corpus.train_lengths):
        expected = set(range(length)) if length > PATCH else set()
        assert covered[series] == expected


def test_windows_are_numbered_by_source(make_corpus) -> None:
    corpus = make_corpus(LENGTHS)
    index = training(corpus)
    assert corpus.sources == ("a", "b", "c")
    for source, count in enumerate(index.counts):
        if count == 0:
            continue
        rows, series, _ = index.locate(np.full(count, source), np.arange(count))
        assert (corpus.source_ids[series] == source).all()
        assert (index.series[rows] == series).all()
    assert index.counts[2] == 0
    assert index.num_windows == index.counts.sum() == len(all_windows(index))


@pytest.mark.parametrize(
    "lengths",
    [
        {"a": [60]},
        {"a": [20] * 60, "b": [2000], "c": [20] * 90 + [300]},  # rows crowd beside a long series
        {"a": [2000] + [20] * 200},
        {"a": [500, 20, 20, 500]},
    ],
)
def test_rows_are_found_as_by_a_search(make_corpus, lengths: dict) -> None:
    index = training(make_corpus(lengths))
    windows = np.arange(index.num_windows)
    expected = np.searchsorted(index.first_window, windows, side="right") - 1
    assert index._rows(windows).tolist() == expected.tolist()


def test_number_of_windows_by_hand(make_corpus) -> None:
    # 40 points, 30 of them train: starts 0, 5 and, for the tail, 6.
    index = training(make_corpus({"a": [40]}), stride=5)
    assert all_windows(index) == [(0, 0), (0, 5), (0, 6)]
    assert index.points.tolist() == [30]


def test_short_series_is_one_window_that_starts_before_it(make_corpus) -> None:
    index = training(make_corpus({"a": [12]}))
    assert all_windows(index) == [(0, 9 - WINDOW)]


def test_series_without_room_for_a_target_are_counted(make_corpus) -> None:
    corpus = make_corpus(LENGTHS)
    assert training(corpus).unusable_series == (corpus.train_lengths <= PATCH).sum() == 3
    assert validation(corpus).unusable_series == (corpus.lengths <= PATCH).sum() == 2


def test_validation_targets_tile_the_part_after_the_split(make_corpus) -> None:
    corpus = make_corpus(LENGTHS)
    index = validation(corpus)
    seen = {series: [] for series in range(corpus.num_series)}
    for series, start in all_windows(index):
        assert start + WINDOW <= corpus.lengths[series]
        seen[series] += range(start + PATCH, start + WINDOW)  # no token precedes the first patch
    for series, (split, end) in enumerate(zip(corpus.train_lengths, corpus.lengths, strict=True)):
        after_split = sorted(place for place in seen[series] if place >= split)
        assert after_split == (list(range(split, end)) if end > PATCH else [])


def test_corpus_without_a_usable_series_is_refused_by_name(make_corpus) -> None:
    corpus = make_corpus({"a": [5, 3]})
    with pytest.raises(DataError, match=rf"{corpus.path}: .*training.*3 points.*patch_length"):
        training(corpus)
    assert validation(corpus).num_windows == 1


def test_corpus_that_trains_on_everything_has_no_validation_window(make_corpus) -> None:
    corpus = make_corpus({"a": [500]}, train_fraction=1.0)
    with pytest.raises(DataError, match="train_fraction below 1"):
        validation(corpus)
