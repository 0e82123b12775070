"""Reading a corpus: memory-mapped shards, and windows gathered out of them.

Nothing is loaded: values stay in the page cache, which all processes of a machine share. Only a
few integers per series are held in memory.

B windows
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import DataError
from data_pipeline.record import SeriesBatch, SeriesRecord, Statistics
from data_pipeline.shards.manifest import Manifest
from data_pipeline.steps.split import train_length


class Corpus:
    """A corpus on local disk; series have numbers from 0, in the order of the shards.

    Can be pickled and used after a fork: a copy opens the memory maps again and refuses a corpus
    that has changed meanwhile.

    Attributes:
        path: the folder.
        manifest: what the folder holds.
        fingerprint: identity of the data.
        num_series: number of series.
        lengths: int64 per series, its points.
        train_lengths: int64 per series, the points of its training part.
        sources: names of the data sets, sorted.
        source_ids: int32 per series, position in `sources`.
        domains: names of the domains, sorted.
        domain_ids: int32 per series, position in `domains`.
    """

    def __init__(self, path: Path, manifest: Manifest, batches: list[SeriesBatch]) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.num_series = manifest.num_series
        self.lengths = np.concatenate([np.diff(batch.offsets) for batch in batches])
        self.train_lengths = train_length(self.lengths, manifest.train_fraction)
        self.sources, self.source_ids = _encode([batch.sources for batch in batches])
        self.domains, self.domain_ids = _encode([batch.domains for batch in batches])
        self._batches = batches
        # Where each series starts within the values of its shard, and which shard that is.
        self._offsets = np.concatenate([batch.offsets[:-1] for batch in batches])
        self._first_series = np.cumsum([0] + [len(batch) for batch in batches])

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Open a corpus folder.

        Raises:
            DataError: if the manifest is missing or damaged, a shard is missing, truncated or
                unreadable, or there is no series.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        problems = manifest.check_sizes(folder)
        if problems:
            more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
            raise DataError(problems[0] + more)
        if manifest.num_series == 0:
            raise DataError(f"{folder}: the corpus is empty; build it again from other sources")
        return cls(folder, manifest, [open_shard(folder / item.file) for item in manifest.shards])

    def item_id(self, index: int) -> str:
        """Name of a series."""
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

    def statistics(self, index: int) -> Statistics:
        """Observed share of a series, and mean and std of its training part."""
        batch, row = self._locate(index)
        return batch.statistics(row)

    def observed_fractions(self) -> np.ndarray:
        """Share of observed points of every series, float32."""
        return np.concatenate([batch.observed_fractions for batch in self._batches])

    def find(self, item_id: str) -> int:
        """Return the number of the first series of that name.

        Raises:
            DataError: if there is none.
        """
        for first, batch in zip(self._first_series, self._batches, strict=False):
            row = pc.index(batch.item_ids, item_id).as_py()
            if row >= 0:
                return int(first) + row
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

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return _reopen, (os.fspath(self.path.absolute()), self.fingerprint)


def open_shard(path: Path) -> SeriesBatch:
    """Memory-map one shard.

    Raises:
        DataError: if it is no Arrow file, or does not hold exactly one record batch.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        num_batches = file.num_record_batches
        batch = file.get_batch(0) if num_batches == 1 else None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: the shard cannot be read ({reason}); rebuild or copy again"
        ) from error
    if batch is None:
        raise DataError(
            f"{path}: the shard has {num_batches} record batches, expected 1; rebuild or copy again"
        )
    return SeriesBatch(batch)


def _reopen(path: str, fingerprint: str) -> Corpus:
    corpus = Corpus.open(path)
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the corpus was rebuilt while in use (fingerprint {corpus.fingerprint[:12]}, "
            f"expected {fingerprint[:12]}); start the run again"
        )
    return corpus


def _encode(columns: list[pa.DictionaryArray]) -> tuple[tuple[str, ...], np.ndarray]:
    """Merge dictionary columns: sorted names, and int32 positions among them."""
    names = tuple(sorted({name for column in columns for name in column.dictionary.to_pylist()}))
    position = {name: index for index, name in enumerate(names)}
    ids = [
        np.array([position[name] for name in column.dictionary.to_pylist()], np.int32)[
            column.indices.to_numpy()
        ]
        for column in columns
    ]
    return names, np.concatenate(ids)
