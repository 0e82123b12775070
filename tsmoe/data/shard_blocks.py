"""Read a source a few shards at a time, so that a bounded cache suffices for a remote corpus.

In each epoch the shards of a source are permuted and taken in blocks; the windows of a block are
mixed with one another, and each comes once. All of it is a function of the epoch's key alone.
A cell is the part of a source that lies in one shard.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tsmoe.data.permutation import Integers, Keys, derived_keys, permute


@dataclass(frozen=True)
class _Layout:
    """One epoch of a source."""

    cells: Integers
    """Cells in the order in which they are read."""
    cell_ends: Integers
    """Windows of all cells up to and with each, in that order."""
    block_ends: Integers
    """The same for blocks of cells."""

    def block(self, turns: Integers) -> tuple[Integers, Integers, Integers]:
        """Return the block of each turn, its first turn and its size."""
        blocks = np.searchsorted(self.block_ends, turns, side="right")
        firsts = np.where(blocks > 0, self.block_ends[blocks - 1], 0)
        return blocks, firsts, self.block_ends[blocks] - firsts


class ShardBlocks:
    """Permutes the windows of each source within blocks of shards."""

    def __init__(
        self,
        sources: NDArray[np.int32],
        shards: NDArray[np.int32],
        counts: Integers,
        resident_shards: int,
    ) -> None:
        """Find the cells.

        Args:
            sources: source of each series, sorted.
            shards: shard of each series, not falling within a source.
            counts: windows of each series, numbered one series after another.
            resident_shards: shards of a source that windows are drawn from at a time.
        """
        begins = np.flatnonzero(
            np.concatenate([[True], (np.diff(sources) != 0) | (np.diff(shards) != 0)])
        )
        self._shards = shards[begins].astype(np.int64)
        self._counts = np.add.reduceat(counts, begins)
        self._num_series = np.diff(begins, append=len(sources))
        of_source = sources[begins]
        self._first_cell = np.searchsorted(of_source, np.arange(int(of_source[-1]) + 2))
        self._resident_shards = resident_shards
        # The layouts of the epochs at hand; a copy in another process makes its own.
        self._layout = functools.lru_cache(maxsize=4096)(self._lay_out)

    @property
    def num_resident(self) -> int:
        """Shards that windows are drawn from at a time, at most."""
        return int(np.minimum(np.diff(self._first_cell), self._resident_shards).sum())

    def is_in_spread(self) -> NDArray[np.bool_]:
        """Tell for each series whether its shard is among evenly spaced ones of its source."""
        is_chosen = np.zeros(len(self._shards), dtype=bool)
        for first, end in itertools.pairwise(self._first_cell):
            count = min(self._resident_shards, end - first)
            is_chosen[first + np.arange(count) * (end - first) // max(count, 1)] = True
        return np.repeat(is_chosen, self._num_series)

    def permute(self, sources: Integers, turns: Integers, keys: Keys) -> Integers:
        """Return the number within its source of the window at each turn of an epoch.

        Args:
            sources: of each window.
            turns: windows of its source that came before it in the epoch.
            keys: of the source and the epoch; each pair has its own.
        """
        numbers = np.empty_like(turns)
        for key, first in zip(*np.unique(keys, return_index=True), strict=True):
            rows = np.flatnonzero(keys == key)
            source = int(sources[first])
            layout = self._layout(source, int(key))
            blocks, firsts, sizes = layout.block(turns[rows])
            block_keys = derived_keys(keys[rows], blocks + 1)
            places = firsts + permute(turns[rows] - firsts, sizes, block_keys)
            at = np.searchsorted(layout.cell_ends, places, side="right")
            cells = layout.cells[at]
            within = places - (layout.cell_ends[at] - self._counts[cells])
            numbers[rows] = self._firsts(source)[cells - self._first_cell[source]] + within
        return numbers

    def neighbours(self, source: int, turn: int, keys: Keys) -> tuple[Integers, Integers]:
        """Return the shards of the block that a turn lies in, and of the block after it.

        Args:
            source: whose turn it is.
            turn: windows of the source that came before in the epoch.
            keys: of the epoch and of the one after it.
        """
        layout = self._layout(source, int(keys[0]))
        block = int(layout.block(np.array([turn]))[0][0])
        size = self._resident_shards
        following = layout.cells[(block + 1) * size : (block + 2) * size]
        if not following.size:
            following = self._layout(source, int(keys[1])).cells[:size]
        return self._shards[layout.cells[block * size : (block + 1) * size]], self._shards[
            following
        ]

    def _firsts(self, source: int) -> Integers:
        counts = self._counts[self._first_cell[source] : self._first_cell[source + 1]]
        return counts.cumsum() - counts

    def _lay_out(self, source: int, key: int) -> _Layout:
        first, end = self._first_cell[source : source + 2]
        numbers = np.arange(end - first, dtype=np.int64)
        keys = np.full(len(numbers), key, dtype=np.uint64)
        cells = first + permute(numbers, np.full_like(numbers, len(numbers)), keys)
        ends = self._counts[cells].cumsum()
        last_of_block = np.append(
            np.arange(self._resident_shards - 1, len(cells) - 1, self._resident_shards),
            len(cells) - 1,
        )
        return _Layout(cells, ends, ends[last_of_block])
