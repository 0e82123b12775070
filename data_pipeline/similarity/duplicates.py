"""Duplicates over all blocks of a build: exact copies, and series that are part of another.

Of exact copies the first stays, in the order of blocks and rows. A series whose values are those of
another but for scale, sign, level and place in time is a near duplicate, as is one that is mostly
contained in a longer one. There the longest stays, of equally long ones the first.

Exact copies are all found. Near duplicates are proposed by shared anchors and decided on the
values: a pair is proposed with probability 1 - exp(-n), where n is the number of windows they
share times the share of windows that are anchors of the longer one, from 1/64 to 1024/length. Two
series that share most of their windows are missed once in 100,000 pairs or less; a series of 1,000
steps within one of 60,000 is missed once in a million, within one of 6 million mostly. Series
shorter than a window, or without an informative one, have no anchors: only exact copies of them
are found.

Peak memory: `memory_bytes`, two series, and some 50 bytes per series.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import ConfigDict

from data_pipeline.similarity.candidates import Numbers, SharedAnchors
from data_pipeline.similarity.match import fit_windows
from data_pipeline.similarity.sketch import Sketch
from data_pipeline.similarity.windows import WINDOW

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

_DIGEST_BYTES = 64  # what a series takes while digests are sorted
_SERIES_COMPARED = 8
"""Series with which one is compared: those that share the most anchors with it."""
_LAGS_COMPARED = 4
"""Shifts in time at which two series are compared, those of the most anchors."""


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    """Which copies of other series are left out, see `data_pipeline.similarity.duplicates`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    exact: bool = True
    """Leave out series all of whose values are those of another."""
    similar: bool = True
    """Leave out series that another one contains, at any scale, sign, level and place in time."""
    containment: float = 0.8
    """How much of a series another must contain, as a share of its changes from step to step, so
    that stretches where nothing happens do not count; in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0.0 < self.containment <= 1.0:
            raise ValueError(f"containment must be in (0, 1], got {self.containment}")


@dataclass(frozen=True)
class Copy:
    """A series that is left out, and the one that stays in its place."""

    block: int
    row: int
    kept_block: int
    kept_row: int
    reason: str


ReadValues = Callable[[int, int], np.ndarray]
"""Values of a series by block and row."""


def find_duplicates(
    sketches: Sequence[Path],
    values_of: ReadValues,
    config: DuplicatesConfig,
    *,
    memory_bytes: int = 256 * 2**20,
) -> Iterator[Copy]:
    """Find the series that are copies of others; the outcome does not depend on `memory_bytes`.

    Args:
        sketches: files of `SketchWriter`, one per block, in order.
        values_of: reads the values of a series; called for proposed pairs only.
        config: what counts as a copy.
        memory_bytes: for digests and anchors at a time.

    Yields:
        Every series that is left out, in the order of blocks and rows. What stays in its place is
        not left out itself.

    Raises:
        DataError: if a file holds no sketches.
    """
    opened = [Sketch(path) for path in sketches]
    firsts = np.cumsum([0, *(len(sketch) for sketch in opened)])
    kept = np.arange(firsts[-1])
    is_exact = np.zeros(firsts[-1], np.bool_)
    if config.exact:
        _find_exact(opened, firsts, kept, memory_bytes)
        is_exact = kept != np.arange(len(kept))
    if config.similar:
        _find_similar(opened, firsts, kept, values_of, config, memory_bytes)

    for series in np.flatnonzero(kept != np.arange(len(kept))):
        stays = kept[series]
        if is_exact[series]:
            stays = kept[stays]  # what it is a copy of may be part of a longer one
        yield Copy(
            *_locate(firsts, int(series)),
            *_locate(firsts, int(stays)),
            DUPLICATE if is_exact[series] else NEAR_DUPLICATE,
        )


def _locate(firsts: Numbers, series: int) -> tuple[int, int]:
    """Return block and row of a series."""
    block = int(np.searchsorted(firsts, series, side="right")) - 1
    return block, series - int(firsts[block])


def _find_exact(
    sketches: Sequence[Sketch], firsts: Numbers, kept: Numbers, memory_bytes: int
) -> None:
    """Point each series at the first with the same digest, some leading digits at a time."""
    num_ranges = int(firsts[-1]) * _DIGEST_BYTES // memory_bytes + 1
    edges = [2**64 * number // num_ranges for number in range(num_ranges + 1)]
    for low, high in pairwise(edges):
        digests, numbers = [np.empty((0, 2), np.uint64)], [np.empty(0, np.int64)]
        for sketch, first in zip(sketches, firsts[:-1], strict=True):
            leading = sketch.digests[:, 0]
            rows = np.flatnonzero((leading >= np.uint64(low)) & (leading <= np.uint64(high - 1)))
            digests.append(sketch.digests[rows])
            numbers.append(rows + first)
        words, series = np.concatenate(digests), np.concatenate(numbers)
        order = np.lexsort((series, words[:, 1], words[:, 0]))
        words, series = words[order], series[order]
        is_first = np.ones(len(series), np.bool_)
        is_first[1:] = (words[1:] != words[:-1]).any(axis=1)
        kept[series] = series[np.maximum.accumulate(np.where(is_first, np.arange(len(series)), 0))]


def _find_similar(
    sketches: Sequence[Sketch],
    firsts: Numbers,
    kept: Numbers,
    values_of: ReadValues,
    config: DuplicatesConfig,
    memory_bytes: int,
) -> None:
    """Point each series at a longer one that stays and contains it."""
    lengths = np.concatenate(
        [np.empty(0, np.int64), *(sketch.lengths.astype(np.int64) for sketch in sketches)]
    )
    by_rank = np.lexsort((np.arange(len(lengths)), -lengths))
    by_rank = by_rank[kept[by_rank] == by_rank]
    ranks = np.full(len(lengths), -1)
    ranks[by_rank] = np.arange(len(by_rank))
    lags = np.zeros(len(lengths), np.int64)
    with SharedAnchors(sketches, ranks, memory_bytes) as shared:
        for rank, pairs in shared:
            series = int(by_rank[rank])
            others = by_rank[pairs[:, 0]]
            offsets = pairs[:, 1]
            # One that goes is replaced by what contains it; ranks rise, so that is known by now.
            places = pairs[:, 2] + lags[others]
            others = kept[others]
            for other in _most_common(others, _SERIES_COMPARED):
                at = others == other
                values = values_of(*_locate(firsts, series))
                of_other = values_of(*_locate(firsts, int(other)))
                share, lag = contained_share(values, of_other, offsets[at], places[at])
                if share >= config.containment:
                    kept[series], lags[series] = other, lag
                    break


def _most_common(numbers: Numbers, most: int) -> Numbers:
    """List the most common numbers; of equally common ones the lower first."""
    unique, counts = np.unique(numbers, return_counts=True)
    common: Numbers = unique[np.argsort(-counts, kind="stable")[:most]]
    return common


def contained_share(
    values: np.ndarray, other: np.ndarray, offsets: Numbers, places: Numbers
) -> tuple[float, int]:
    """Measure how much of a series another one contains, given windows that may match.

    Stretches of at least `WINDOW` steps count in which all values agree.

    Args:
        values: the series.
        other: another.
        offsets: where windows begin in `values`.
        places: where the same windows would be in `other`.

    Returns:
        The share of the changes of `values` from step to step that lie in common stretches, and
        how far its best match is shifted: place in `other` less place in `values`.
    """
    lags = places - offsets
    covered = np.zeros(len(values), np.bool_)
    best, best_lag = 0, 0
    for lag in _most_common(lags, _LAGS_COMPARED):
        agrees = _agreement_at(values, other, int(lag), offsets[lags == lag])
        count = int(agrees.sum())
        if count > best:
            best, best_lag = count, int(lag)
        covered |= agrees
    changes = np.diff(values)
    is_change = (changes != 0) & ~np.isnan(changes)
    total = int(is_change.sum())
    if total == 0:
        return 0.0, best_lag
    return int((is_change & covered[1:] & covered[:-1]).sum()) / total, best_lag


def _agreement_at(values: np.ndarray, other: np.ndarray, lag: int, offsets: Numbers) -> np.ndarray:
    """Which steps of a series lie in stretches that another has as well, shifted by a lag."""
    agrees = np.zeros(len(values), np.bool_)
    begin, end = max(0, -lag), min(len(values), len(other) - lag)
    offsets = offsets[(offsets >= begin) & (offsets + WINDOW <= end)]
    if not len(offsets):
        return agrees
    steps = offsets[:, None] + np.arange(WINDOW)
    fits = fit_windows(other[steps + lag], values[steps])
    matches = np.flatnonzero(fits.agrees_B)
    if not len(matches):
        return agrees
    # The window with the widest range gives the scale most exactly.
    fit = fits[int(matches[np.argmax(fits.spread_B[matches])])]
    agreement = fit.agreement(other[begin + lag : end + lag], values[begin:end])
    edges = np.flatnonzero(np.diff(agreement, prepend=False, append=False))
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        if last - first >= WINDOW:
            agrees[begin + first : begin + last] = True
    return agrees
