"""Which windows a corpus has for training and for validation.

A series is split in time: training windows lie before the split, validation windows have their
targets after it (their context may reach back). A series shorter than a window gives one window,
filled up at the left with points that are not observed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.reader import Corpus
from tsmoe.errors import DataError

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class WindowIndex:
    """The windows of one split, numbered within each source.

    Series are sorted by source.
    """

    series: Integers
    """Number in the corpus of each series that has windows."""
    begins: Integers
    """First point that is a target (validation) or may be in a window (training)."""
    ends: Integers
    """One after the last point that may be in a window."""
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
        windows = numbers + (self.counts.cumsum() - self.counts)[sources]
        rows = np.searchsorted(self.first_window, windows, side="right") - 1
        within = windows - self.first_window[rows]
        if self.is_validation:
            # From the end backwards, so that every target after the split is seen once.
            starts = self.ends[rows] - within * self.stride - self.window_length
        else:
            latest = self.ends[rows] - self.window_length
            # The last window ends with the series' last point: no tail is left out.
            starts = np.minimum(within * self.stride, latest)
        return rows, self.series[rows], starts


def training_windows(
    corpus: Corpus, *, window_length: int, patch_length: int, stride: int
) -> WindowIndex:
    """Number the windows before the split of every series.

    Raises:
        DataError: if there is none.
    """
    ends = corpus.train_lengths
    counts = np.maximum(-(-(ends - window_length) // stride), 0) + 1
    counts = np.where(ends > patch_length, counts, 0)
    return _index(
        corpus,
        begins=np.zeros_like(ends),
        ends=ends,
        counts=counts,
        window_length=window_length,
        stride=stride,
        is_validation=False,
    )


def validation_windows(corpus: Corpus, *, window_length: int, patch_length: int) -> WindowIndex:
    """Number windows whose targets tile the part after the split of every series."""
    context_length = window_length - patch_length
    begins, ends = corpus.train_lengths, corpus.lengths
    counts = -(-(ends - begins) // context_length)
    counts = np.where((ends > patch_length) & (ends > begins), counts, 0)
    return _index(
        corpus,
        begins=begins,
        ends=ends,
        counts=counts,
        window_length=window_length,
        stride=context_length,
        is_validation=True,
    )


def _index(
    corpus: Corpus,
    *,
    begins: Integers,
    ends: Integers,
    counts: Integers,
    window_length: int,
    stride: int,
    is_validation: bool,
) -> WindowIndex:
    by_source = np.argsort(corpus.source_ids, kind="stable")
    usable = by_source[counts[by_source] > 0]
    if not usable.size and is_validation:
        raise DataError(
            f"{corpus.path}: no series has a point to validate on; build the corpus with a "
            "train_fraction below 1, or from longer series"
        )
    if not usable.size:
        raise DataError(
            f"{corpus.path}: no series is long enough for a training window (the longest has "
            f"{int(corpus.train_lengths.max())} points before the split); shorten "
            "model.patch_length or add longer series"
        )
    num_sources = len(corpus.sources)
    source_of = corpus.source_ids[usable]
    return WindowIndex(
        series=usable,
        begins=begins[usable],
        ends=ends[usable],
        first_window=counts[usable].cumsum() - counts[usable],
        counts=np.bincount(source_of, counts[usable], minlength=num_sources).astype(np.int64),
        points=np.bincount(source_of, (ends - begins)[usable], minlength=num_sources).astype(
            np.int64
        ),
        unusable_series=corpus.num_series - len(usable),
        window_length=window_length,
        stride=stride,
        is_validation=is_validation,
    )
