"""Put several short series into one window, so that little of it is fill.

A pack is one window of its source: how sources are mixed, the order of windows and how a run
resumes know nothing of packs. Packs are made of series of one source in one shard, so that they
are read as a window is. A window has slots of a patch each; a series takes as many as hold it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.reader import Corpus
from tsmoe.data.permutation import Integers, permute
from tsmoe.data.windows import WindowIndex


@dataclass(frozen=True)
class SeriesPacks:
    """Which short series share a window."""

    index: WindowIndex
    """Windows of long series and packs; a pack stands where its first series would."""
    heads: NDArray[np.int32]
    """First series of each pack, rising."""
    first_member: Integers
    """Members of all packs before each, and of all."""
    members: NDArray[np.int32]
    """Series of each pack, pack by pack."""

    @classmethod
    def of(
        cls, corpus: Corpus, index: WindowIndex, *, patch_length: int, key: np.uint64
    ) -> SeriesPacks:
        """Pack the series of an index that are shorter than its windows.

        Series of a cell (a source in a shard) are taken longest first, each into the first pack
        that has room (first-fit decreasing: at most 11/9 of the fewest packs, and one more). Of
        those that take equally many slots, a keyed permutation decides, as neighbours in a corpus
        are often alike.

        Args:
            corpus: where the series are.
            index: of training windows; their length is a multiple of `patch_length`.
            patch_length: points of a slot.
            key: of the permutation, see `order_key`.
        """
        num_slots = index.window_length // patch_length
        is_short = index.ends[index.series] < index.window_length
        series = index.series[is_short]
        slots = -(-index.ends[series] // patch_length)
        cells = corpus.source_ids[series].astype(np.int64) * len(corpus.manifest.shards)
        cells += corpus.series_shards[series]
        sizes, keys = np.full(len(series), len(series)), np.full(len(series), key)
        places = permute(np.arange(len(series)), sizes, keys)
        order = np.lexsort((places, -slots, cells))
        edges = np.flatnonzero(np.diff(cells[order], prepend=-1, append=-1))
        packs = np.empty(len(series), np.int64)
        num_packs = 0
        for first, end in itertools.pairwise(edges):
            packs[first:end] = num_packs + _first_fit(slots[order[first:end]], num_slots)
            num_packs = int(packs[first:end].max()) + 1
        by_pack = packs.argsort(kind="stable")
        members, packs = series[order][by_pack], packs[by_pack]
        # Packs in the order of their first series, as is the index.
        heads = np.full(num_packs, np.iinfo(np.int32).max, np.int32)
        np.minimum.at(heads, packs, members)
        rank = np.empty(num_packs, np.int64)
        rank[heads.argsort()] = np.arange(num_packs)
        by_head = rank[packs].argsort(kind="stable")
        heads.sort()
        counts = np.bincount(rank[packs], minlength=num_packs)
        return cls(
            index=_without(index, corpus, is_short & ~np.isin(index.series, heads)),
            heads=heads,
            first_member=np.concatenate([[0], counts.cumsum()]),
            members=members[by_head],
        )

    def find(self, series: Integers) -> tuple[Integers, NDArray[np.bool_]]:
        """Return for windows of the index, named by their series, their pack and if they have one.

        The pack of a window that is none is any number of a pack.
        """
        if not len(self.heads):
            return np.zeros_like(series), np.zeros(len(series), dtype=bool)
        packs = np.minimum(np.searchsorted(self.heads, series), len(self.heads) - 1)
        return packs, self.heads[packs] == series


def _first_fit(slots: Integers, num_slots: int) -> Integers:
    """Return the pack of each series; they come longest first.

    Packs are filled one after the other, each with the longest that still fit, which is the same;
    packs of the same make are filled all at once, so that a million series take milliseconds.
    """
    sizes, left = (array[::-1] for array in np.unique(slots, return_counts=True))
    left = left.copy()
    place = left.cumsum() - left
    packs = np.empty(len(slots), np.int64)
    num_packs = 0
    while left.any():
        room, used = num_slots, np.zeros_like(left)
        for kind in np.flatnonzero(left):
            used[kind] = min(left[kind], room // sizes[kind])
            room -= used[kind] * sizes[kind]
        kinds = np.flatnonzero(used)
        repeats = int((left[kinds] // used[kinds]).min())
        numbers = num_packs + np.arange(repeats)
        for kind in kinds:
            count = repeats * used[kind]
            packs[place[kind] : place[kind] + count] = numbers.repeat(used[kind])
            place[kind] += count
            left[kind] -= count
        num_packs += repeats
    return packs


def _without(index: WindowIndex, corpus: Corpus, is_left_out: NDArray[np.bool_]) -> WindowIndex:
    """Take series out of an index; a source keeps its points, so that its share stays."""
    counts = np.diff(index.first_window, append=index.num_windows)[~is_left_out]
    series = index.series[~is_left_out]
    windows = np.concatenate([[0], counts.cumsum()])
    edges = np.searchsorted(corpus.source_ids[series], np.arange(len(corpus.sources) + 1))
    return replace(index, series=series, first_window=windows[:-1], counts=np.diff(windows[edges]))
