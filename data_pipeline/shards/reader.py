"""Reading a corpus: memory-mapped shards, and windows gathered out of them.

Nothing is loaded: values stay in the page cache, which all processes of a machine share, and shards
are opened when they are first read. Only a few numbers per series are held in memory.

B windows
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.errors import DamagedFileError, DataError
from data_pipeline.record import SeriesBatch, SeriesRecord, Statistics
from data_pipeline.shards.index import SeriesIndex, read_index
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.resident import ResidentShards, open_shard
from data_pipeline.steps.split import train_length
from data_pipeline.storage.cache import FileCache
from data_pipeline.storage.store import Store

__all__ = ["Corpus", "open_shard"]


class Corpus:
    """A corpus on local disk or in a remote store; series have numbers from 0, in shard order.

    Can be pickled and used after a fork: a copy opens the memory maps again and refuses a corpus
    that has changed meanwhile.

    Attributes:
        path: the folder; of a remote corpus its URL, for messages.
        store: where its files lie.
        manifest: what it holds.
        fingerprint: identity of the data.
        index: what is known of the series without opening a shard.
        num_series: number of series.
        lengths: int64 per series, its points.
        train_lengths: int64 per series, the points of its training part; 0 where it is held out.
        sources: names of the data sets, sorted.
        source_ids: int32 per series, position in `sources`.
        domains: names of the domains, sorted.
        domain_ids: int32 per series, position in `domains`.
        held_out: bool per series, whether none of its points may be trained on.
        series_shards: int32 per series, the shard it lies in.
        max_resident_shards: of a remote corpus, how many shards its cache holds; else None.
    """

    def __init__(
        self, store: Store, manifest: Manifest, index: SeriesIndex, cache: FileCache | None
    ) -> None:
        self.store = store
        self.path: Path | str = store.local_path("") if store.is_local else str(store)
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.index = index
        self.num_series = manifest.num_series
        self.lengths = index.lengths
        self.train_lengths = train_length(self.lengths, manifest.train_fraction)
        self.train_lengths[index.held_out] = 0
        self.sources, self.source_ids = index.sources, index.source_ids
        self.domains, self.domain_ids = index.domains, index.domain_ids
        self.held_out = index.held_out
        rows = np.array([shard.rows for shard in manifest.shards])
        self.series_shards = np.repeat(np.arange(len(rows), dtype=np.int32), rows)
        self.max_resident_shards = None
        if cache is not None:
            largest = max(shard.bytes for shard in manifest.shards)
            self.max_resident_shards = cache.limit_bytes // largest
        self._lost_shards: NDArray[np.bool_] | None = None
        self._cache = cache
        self._batches = ResidentShards(store, manifest.shards, cache)
        self._first_series = np.cumsum([0, *rows])
        self._first_addresses = np.zeros(len(rows), np.int64)
        # Where each series starts within the values of its shard.
        self._offsets = self._count_offsets()

    @classmethod
    def open(
        cls,
        where: str | os.PathLike[str] | Store,
        *,
        cache: FileCache | None = None,
        tolerates_bad_shards: bool = False,
    ) -> "Corpus":
        """Open a corpus.

        Args:
            where: folder or URL.
            cache: for a remote corpus; default: the one of this node, see `FileCache.of_node`.
            tolerates_bad_shards: whether shards may be missing or truncated; who reads one of them
                gets a `ShardError`, unless it was declared lost.

        Raises:
            DataError: if the manifest is missing or damaged, a shard of a local corpus is missing
                or truncated, or there is no series.
        """
        store = Store.at(where)
        manifest = Manifest.read(store)
        if manifest.num_series == 0:
            raise DataError(f"{store}: the corpus is empty; build it again from other sources")
        if store.is_local:
            cache = None
            wrong = manifest.find_wrong_sizes(store)
            if tolerates_bad_shards:
                wrong = {name: wrong[name] for name in wrong if name == _index_file(manifest)}
            if problems := list(wrong.values()):
                more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
                raise DamagedFileError(problems[0] + more)
        elif cache is None:
            cache = FileCache.of_node()
        return cls(store, manifest, _load_index(store, manifest, cache), cache)

    def lose(self, shards: Iterable[int]) -> None:
        """Declare shards lost: they are never opened again, and nothing of them was observed."""
        lost = np.zeros(len(self._batches), np.bool_)
        if self._lost_shards is not None:
            lost |= self._lost_shards
        lost[list(shards)] = True
        self._lost_shards = lost

    def is_lost(self, series_ids: np.ndarray) -> NDArray[np.bool_] | None:
        """Say which series lie in lost shards; None where no shard is lost."""
        lost = self._lost_shards
        return None if lost is None else lost[self.series_shards[series_ids]]

    def item_id(self, index: int) -> str:
        """Name of a series."""
        is_lost = self.is_lost(np.array([index]))
        if is_lost is not None and is_lost[0]:
            return f"series {index} of a lost shard"
        batch, row = self._locate(index)
        return batch.item_ids[row].as_py()

    def record(self, index: int) -> SeriesRecord:
        """A series with all that is known of it; its values are a read-only view."""
        batch, row = self._locate(index)
        return batch.record(row)

    def series(self, index: int) -> np.ndarray:
        """Values of a series: a read-only view of the memory map."""
        batch, row = self._locate(index)
        return batch.series(row)

    def shard(self, number: int) -> SeriesBatch:
        """All series of a shard at once; that of a remote corpus is fetched if need be."""
        return self._batches[number]

    def statistics(self, index: int) -> Statistics:
        """Observed share of a series, and mean and std of its training part."""
        batch, row = self._locate(index)
        return batch.statistics(row)

    def observed_fractions(self) -> np.ndarray:
        """Share of observed points of every series, float32."""
        return self.index.observed_fractions

    def prefetch(self, shards: Iterable[int]) -> None:
        """Begin to bring shards of a remote corpus onto this node, in this order; returns at once.

        Args:
            shards: their numbers, see `series_shards`.
        """
        self._batches.prefetch(shards)

    def find(self, item_id: str) -> int:
        """Return the number of the first series of that name.

        Raises:
            DataError: if there is none.
        """
        for shard in range(len(self._batches)):
            row = pc.index(self._batches[shard].item_ids, item_id).as_py()
            if row >= 0:
                return int(self._first_series[shard]) + row
        raise DataError(
            f"{self.path}: no series is named {item_id!r}; names look like {self.item_id(0)!r}"
        )

    def gather(self, series_ids: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
        """Copy windows out of many series, in one vectorised read per shard.

        Args:
            series_ids: int64 (B,).
            starts: int64 (B,), first point of each window; where negative, the points before the
                series are NaN.
            length: points per window, at least 1.

        Returns:
            float32 (B, length).

        Raises:
            IndexError: if a series does not exist, or a window ends after its series.
        """
        series_ids = np.asarray(series_ids, np.int64)
        starts = np.asarray(starts, np.int64)
        self._check_windows(series_ids, starts, length)
        firsts = self._offsets[series_ids] + starts
        shards = np.searchsorted(self._first_series, series_ids, side="right") - 1
        is_early = starts < 0
        is_whole = ~is_early
        if is_whole.all() and (shards == shards[:1]).all() and shards.size:
            return self._windows(int(shards[0]), length)[firsts]  # the usual case: a single copy

        windows = np.empty((len(series_ids), length), np.float32)
        for shard in np.unique(shards[is_whole]):
            rows = np.flatnonzero((shards == shard) & is_whole)
            windows[rows] = self._windows(int(shard), length)[firsts[rows]]
        for row in np.flatnonzero(is_early):
            end = max(0, int(starts[row]) + length)
            windows[row, : length - end] = np.nan
            windows[row, length - end :] = self.series(int(series_ids[row]))[:end]
        return windows

    def addresses(
        self, series_ids: np.ndarray, starts: np.ndarray, length: int
    ) -> tuple[NDArray[np.int64], list[SeriesBatch]]:
        """Where windows lie in memory, for a reader that gathers out of many shards at once.

        Args:
            series_ids: int64 (B,).
            starts: int64 (B,), first point of each window, may be negative.
            length: points per window, at least 1.

        Returns:
            int64 (B,), address of the first point of each window, -1 where that lies before the
            first point of the shard or in a lost shard; and what must be held while the addresses
            are used. Points before a series are those of another.

        Raises:
            IndexError: if a series does not exist, or a window ends after its series.
        """
        self._check_windows(series_ids, starts, length)
        is_lost = self.is_lost(series_ids)
        if is_lost is not None and is_lost.any():
            found = np.full(len(series_ids), -1, np.int64)
            there = np.flatnonzero(~is_lost)
            found[there], kept = self.addresses(series_ids[there], starts[there], length)
            return found, kept
        shards = self.series_shards[series_ids]
        held: list[SeriesBatch] = []
        if self._cache is None:  # shards of a local corpus stay mapped
            bases = self._first_addresses[shards]
            if not bases.all():
                for shard in np.unique(shards[bases == 0]):
                    self._first_addresses[shard] = _address(self._batches[int(shard)])
                bases = self._first_addresses[shards]
        else:
            numbers, places = np.unique(shards, return_inverse=True)
            held = [self._batches[int(shard)] for shard in numbers]
            bases = np.array([_address(batch) for batch in held], np.int64)[places]
        firsts = self._offsets[series_ids] + starts
        return np.where(firsts < 0, -1, bases + 4 * firsts), held

    def _windows(self, shard: int, length: int) -> np.ndarray:
        """All windows of a shard as a view; indexing it with offsets copies only those."""
        values = self._batches[shard].values
        return np.lib.stride_tricks.sliding_window_view(values, length)

    def _check_windows(self, series_ids: np.ndarray, starts: np.ndarray, length: int) -> None:
        if length < 1:
            raise ValueError(f"length of a window must be at least 1, got {length}")
        unknown = (series_ids < 0) | (series_ids >= self.num_series)
        if unknown.any():
            raise IndexError(
                f"series {series_ids[unknown][0]} does not exist; the corpus has {self.num_series}"
            )
        beyond = starts + length > self.lengths[series_ids]
        if beyond.any():
            row = int(np.argmax(beyond))
            raise IndexError(
                f"window [{starts[row]}, {starts[row] + length}) ends after series "
                f"{series_ids[row]}, which has {self.lengths[series_ids[row]]} points"
            )

    def _locate(self, index: int) -> tuple[SeriesBatch, int]:
        if not 0 <= index < self.num_series:
            raise IndexError(f"series {index} does not exist; the corpus has {self.num_series}")
        shard = int(np.searchsorted(self._first_series, index, side="right")) - 1
        return self._batches[shard], index - int(self._first_series[shard])

    def _count_offsets(self) -> NDArray[np.int64]:
        ends = np.cumsum(self.lengths)
        ends -= self.lengths
        ends -= ends[self._first_series[:-1]][self.series_shards]
        return ends

    def __reduce__(self) -> tuple[object, tuple[Store, str, FileCache | None]]:
        return _reopen, (self.store, self.fingerprint, self._cache)


def _index_file(manifest: Manifest) -> str | None:
    return None if manifest.index is None else manifest.index.file


def _address(batch: SeriesBatch) -> int:
    """Address of the first value of a shard."""
    return int(batch.values.__array_interface__["data"][0])


def _load_index(store: Store, manifest: Manifest, cache: FileCache | None) -> SeriesIndex:
    """Map the series index; where a corpus has none, ask all shards."""
    entry = manifest.index
    if entry is not None and cache is None:
        path = store.local_path(entry.file)
        return read_index(path, name=str(path), num_series=manifest.num_series)
    if entry is not None and cache is not None:
        name = store.path_of(entry.file)
        # The mapping stays readable if the cache removes the file later.
        with cache.hold(store, entry.file, size=entry.bytes, sha256=entry.sha256) as file:
            return read_index(file.path, name=name, num_series=manifest.num_series)
    shards = ResidentShards(store, manifest.shards, cache)
    return SeriesIndex.join(
        [
            SeriesIndex.of_shard(shards[number], shard.held_out)
            for number, shard in enumerate(manifest.shards)
        ]
    )


def _reopen(store: Store, fingerprint: str, cache: FileCache | None) -> Corpus:
    corpus = Corpus.open(store, cache=cache)
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"{store}: the corpus was rebuilt while in use (fingerprint {corpus.fingerprint[:12]}, "
            f"expected {fingerprint[:12]}); start the run again"
        )
    return corpus
