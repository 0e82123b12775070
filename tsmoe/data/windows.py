"""Which windows a corpus has for training and for validation.

A series is split in time: training windows lie before the split, validation windows have their
targets after it (their context may reach back). A series shorter than a window gives one window,
filled up at the left with points that are not observed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.reader import Corpus
from tsmoe.errors import DataError

Integers = NDArray[np.int64]

# Rows that are walked from where the guide table points, before a search takes over.
_GUIDED_STEPS = 4


@dataclass(frozen=True)
class WindowIndex:
    """The windows of one split, numbered within each source; series are sorted by source."""

    series: NDArray[np.int32]
    """Number in the corpus of each series that has windows."""
    begins: Integers | None
    """First point that is a target, of every series of the corpus; None: the first of all."""
    ends: Integers
    """One after the last point that may be in a window, of every series of the corpus."""
    first_window: Integers
    """Windows of all series before each, in the order of this index."""
    counts: Integers
    """Windows of each source."""
    points: Integers
    """Points of each source in this split."""
    unusable_series: int
    """Series too short to hold a patch and a target."""
    window_length: int
    stride: int
    is_validation: bool

    @property
    def num_windows(self) -> int:
        """Windows of all sources."""
        return int(self.counts.sum())

    def locate(self, sources: Integers, numbers: Integers) -> tuple[Integers, Integers, Integers]:
        """Return row in this index, series and start of each window; a start may be negative."""
        windows = numbers + (self.counts.cumsum() - self.counts).take(sources)
        rows = self._rows(windows)
        within = windows - self.first_window.take(rows)
        series = self.series.take(rows).astype(np.int64)
        latest = self.ends.take(series) - self.window_length
        if self.is_validation:
            # From the end backwards, so that every target after the split is seen once.
            starts = latest - within * self.stride
        else:
            # The last window ends with the series' last point: no tail is left out.
            starts = np.minimum(within * self.stride, latest)
        return rows, series, starts

    def _rows(self, windows: Integers) -> Integers:
        """Return the row of each window.

        By a guide table: of about as many stretches of windows as there are rows, the row that each
        begins in, or a few before the one that is sought. A binary search is a third of all that
        is done for a window beside copying it, and more with a million series.
        """
        shift, guide = self._guide
        rows = guide.take(windows >> shift)
        for _ in range(_GUIDED_STEPS):
            is_before = self._next_window.take(rows) <= windows
            if not is_before.any():
                return rows
            rows += is_before
        # Many short series beside a long one: their rows crowd in few stretches.
        far = np.flatnonzero(self._next_window.take(rows) <= windows)
        rows[far] = np.searchsorted(self.first_window, windows[far], side="right") - 1
        return rows

    @functools.cached_property
    def _guide(self) -> tuple[int, Integers]:
        per_row = self.num_windows // len(self.series)
        shift = max(per_row.bit_length() - 1, 0)
        begins = np.arange((self.num_windows >> shift) + 1, dtype=np.int64) << shift
        return shift, np.searchsorted(self.first_window, begins, side="right") - 1

    @functools.cached_property
    def _next_window(self) -> Integers:
        return np.append(self.first_window[1:], self.num_windows)


def training_windows(
    corpus: Corpus, *, window_length: int, patch_length: int, stride: int
) -> WindowIndex:
    """Number the windows before the split of every series.

    Raises:
        DataError: if there is none.
    """
    # In place where it can be: with a million series every temporary is 8 MB.
    counts = corpus.train_lengths - (window_length - stride + 1)
    counts //= stride
    np.maximum(counts, 0, out=counts)
    counts += 1
    counts[corpus.train_lengths <= patch_length] = 0
    return _index(
        corpus,
        begins=None,
        ends=corpus.train_lengths,
        counts=counts,
        window_length=window_length,
        stride=stride,
        is_validation=False,
    )


def validation_windows(corpus: Corpus, *, window_length: int, patch_length: int) -> WindowIndex:
    """Number windows whose targets tile the part after the split of every series."""
    context_length = window_length - patch_length
    counts = corpus.lengths - corpus.train_lengths
    counts += context_length - 1
    counts //= context_length
    counts[corpus.lengths <= patch_length] = 0
    return _index(
        corpus,
        begins=corpus.train_lengths,
        ends=corpus.lengths,
        counts=counts,
        window_length=window_length,
        stride=context_length,
        is_validation=True,
    )


def _index(
    corpus: Corpus,
    *,
    begins: Integers | None,
    ends: Integers,
    counts: Integers,
    window_length: int,
    stride: int,
    is_validation: bool,
) -> WindowIndex:
    series = np.flatnonzero(counts).astype(np.int32)
    if not series.size and is_validation:
        raise DataError(
            f"{corpus.path}: no series has a point to validate on; build the corpus with a "
            "train_fraction below 1, or from longer series"
        )
    if not series.size:
        raise DataError(
            f"{corpus.path}: no series is long enough for a training window (the longest has "
            f"{int(corpus.train_lengths.max())} points before the split); shorten "
            "model.patch_length or add longer series"
        )
    sources = corpus.source_ids[series]
    if (sources[1:] < sources[:-1]).any():
        by_source = sources.argsort(kind="stable")
        series, sources = series[by_source], sources[by_source]
    edges = np.searchsorted(sources, np.arange(len(corpus.sources) + 1))
    windows = _running_sum(counts[series])
    points = _running_sum(ends[series] if begins is None else ends[series] - begins[series])
    return WindowIndex(
        series=series,
        begins=begins,
        ends=ends,
        first_window=windows[:-1],
        counts=np.diff(windows[edges]),
        points=np.diff(points[edges]),
        unusable_series=corpus.num_series - len(series),
        window_length=window_length,
        stride=stride,
        is_validation=is_validation,
    )


def _running_sum(values: Integers) -> Integers:
    """Return the sum of all values before each, and of all."""
    sums = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(values, out=sums[1:])
    return sums
