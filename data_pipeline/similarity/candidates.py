"""Pairs of series that share anchors, found in bounded memory.

Anchors of all blocks are looked at in ranges of hashes that fit into memory. Of the series that
have an anchor in common each is paired with the first few and with the one before it, not with all:
the work grows with the number of anchors, however popular a pattern is. A series of which all are
copies is still found, by its first; what can be missed is a copy whose every anchor is so common.
The pairs go to disk, ordered by series.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.similarity.sketch import Sketch

Numbers = NDArray[np.int64]

FIRST_PARTNERS = 4
"""An anchor pairs a series with so many of the first that have it, and with the one before."""
PAIRS_PER_SERIES = 128
"""Those of the lowest hashes; they are a random choice of the anchors that a series shares."""

_ANCHOR_BYTES = 512  # what an anchor of a range takes while pairs are made
_SERIES_PER_PART = 2**14
_COLUMNS = 4


class SharedAnchors:
    """The pairs of anchors that series have in common with series of lower rank.

    Use as a context manager: the pairs lie in a temporary folder.

    Args:
        sketches: of all blocks.
        ranks: int64 per series over all blocks; the lower stays if two are alike. -1 leaves out.
        memory_bytes: for the anchors of a range.
    """

    def __init__(self, sketches: Sequence[Sketch], ranks: Numbers, memory_bytes: int) -> None:
        self._sketches = sketches
        self._ranks = ranks
        self._firsts = np.cumsum([0, *(len(sketch) for sketch in sketches)])
        self._anchors_at_once = max(1, memory_bytes // _ANCHOR_BYTES)
        self._num_pairs = np.zeros(len(ranks), np.uint8)

    def __enter__(self) -> "SharedAnchors":
        self._folder = tempfile.TemporaryDirectory(prefix="tsmoe-anchors-")
        for low, high in self._ranges(0, 2**64):
            self._pair(low, high)
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def __iter__(self) -> Iterator[tuple[int, Numbers]]:
        """Yield each series by rank with its pairs.

        Yields:
            The rank, and int64 (pairs, 3): rank of the other series, offset of the anchor in this
            one, and in the other.
        """
        for part in range(len(self._ranks) // _SERIES_PER_PART + 1):
            file = self._part_file(part)
            if not file.exists():
                continue
            pairs = np.fromfile(file, np.int64).reshape(-1, _COLUMNS)
            pairs = pairs[np.lexsort(pairs.T[::-1])]
            starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
            for rows in np.split(pairs, starts[1:]):
                yield int(rows[0, 0]), rows[:, 1:]

    def _part_file(self, part: int) -> Path:
        return Path(self._folder.name) / f"{part:08d}"

    def _ranges(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Split the hashes from `low` until before `high` until each range has few anchors."""
        if self._count(low, high) <= self._anchors_at_once or high - low == 1:
            yield low, high
            return
        middle = (low + high) // 2
        yield from self._ranges(low, middle)
        yield from self._ranges(middle, high)

    def _count(self, low: int, high: int) -> int:
        return sum(end - first for first, end in self._bounds(low, high))

    def _bounds(self, low: int, high: int) -> list[tuple[int, int]]:
        """Where a range of hashes lies in each sketch."""
        last = np.uint64(high - 1)
        return [
            (
                int(np.searchsorted(sketch.hashes, np.uint64(low), side="left")),
                int(np.searchsorted(sketch.hashes, last, side="right")),
            )
            for sketch in self._sketches
        ]

    def _pair(self, low: int, high: int) -> None:
        """Pair the series that share a hash of a range, and put the pairs on disk."""
        parts = [
            (hashes, self._ranks[first + rows], offsets)
            for sketch, first, bounds in zip(
                self._sketches, self._firsts[:-1], self._bounds(low, high), strict=True
            )
            for hashes, rows, offsets in [sketch.anchors(*bounds)]
        ]
        if not parts:
            return
        hashes, ranks, offsets = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.lexsort((ranks, hashes))
        order = order[ranks[order] >= 0]
        hashes, ranks, offsets = hashes[order], ranks[order], offsets[order]
        is_first = np.ones(len(hashes), np.bool_)
        is_first[1:] = hashes[1:] != hashes[:-1]
        places = np.arange(len(hashes))
        group = np.maximum.accumulate(np.where(is_first, places, 0))
        others = [group + nth for nth in range(FIRST_PARTNERS)]
        others.append(np.maximum(places - 1, group + FIRST_PARTNERS))  # the one before, if later
        pairs = []
        for nth, other in enumerate(others):
            has = np.flatnonzero(other < places)
            place = other[has]
            pairs.append(np.stack([ranks[has], has, np.full_like(has, nth), place], axis=1))
        found = np.concatenate(pairs)
        found = self._limit(found[np.lexsort(found.T[2::-1])])
        self._put(
            np.stack(
                [found[:, 0], ranks[found[:, 3]], offsets[found[:, 1]], offsets[found[:, 3]]],
                axis=1,
            )
        )

    def _limit(self, pairs: Numbers) -> Numbers:
        """Take the first pairs of each series only, counting those of lower hashes."""
        series = pairs[:, 0]
        starts = np.flatnonzero(np.diff(series, prepend=-1))
        counts = np.diff(np.append(starts, len(series)))
        nth = np.arange(len(series)) - np.repeat(starts, counts)
        taken = pairs[nth + self._num_pairs[series] < PAIRS_PER_SERIES]
        total = self._num_pairs[series[starts]] + np.minimum(counts, PAIRS_PER_SERIES)
        self._num_pairs[series[starts]] = np.minimum(total, PAIRS_PER_SERIES)
        return taken

    def _put(self, pairs: Numbers) -> None:
        part_of = pairs[:, 0] // _SERIES_PER_PART
        for part in np.unique(part_of):
            with self._part_file(int(part)).open("ab") as file:
                np.ascontiguousarray(pairs[part_of == part], np.int64).tofile(file)
