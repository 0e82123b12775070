"""Writing series into Arrow shards.

A shard is an uncompressed Arrow IPC file with one record batch, so that all its values lie in one
contiguous float32 buffer. At most one shard is held in memory.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.record import SCHEMA, SeriesBatch, SeriesRecord
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.storage.durable import durable_file

SHARD_PATTERN = "part-[0-9][0-9][0-9][0-9][0-9].arrow"
DEFAULT_SHARD_SIZE_BYTES = 256 * 2**20

_VALUE_BYTES = 4
_ROW_BYTES = 256  # what a series costs beside its values; keeps shards of very short series small


class ShardWriter:
    """Collects series and writes a shard whenever the next series would not fit.

    Args:
        folder: where the shards go.
        train_fraction: share of each series that its stored mean and std may see.
        shard_size_bytes: values per shard; a series that is longer gets a shard of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        train_fraction: float,
        shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    ) -> None:
        self.folder = folder
        self.train_fraction = train_fraction
        self.shard_size_bytes = shard_size_bytes
        self._buffer = np.empty(max(1, shard_size_bytes // _VALUE_BYTES), np.float32)
        self._points = 0
        self._records: list[SeriesRecord] = []
        self._held_out: list[int] = []
        self._shards: list[ShardEntry] = []

    def add(self, record: SeriesRecord, *, is_held_out: bool = False) -> None:
        """Take a copy of a series; may write a shard.

        Args:
            record: the series.
            is_held_out: whether no point of it may be trained on.

        Raises:
            DataError: if a shard cannot be written.
        """
        size = len(record.values)
        num_bytes = (self._points + size) * _VALUE_BYTES + len(self._records) * _ROW_BYTES
        if num_bytes > self.shard_size_bytes:
            self._flush()
        if size > len(self._buffer):
            alone = np.ascontiguousarray(record.values, np.float32)
            self._write([record], alone, held_out=[0] if is_held_out else [])
            return
        if is_held_out:
            self._held_out.append(len(self._records))
        values = self._buffer[self._points : self._points + size]
        values[:] = record.values
        self._points += size
        self._records.append(replace(record, values=values))

    def close(self) -> list[ShardEntry]:
        """Write what is left, and list all shards in order."""
        self._flush()
        return self._shards

    def _flush(self) -> None:
        if self._records:
            self._write(self._records, self._buffer[: self._points], held_out=self._held_out)
        self._records = []
        self._held_out = []
        self._points = 0

    def _write(
        self, records: list[SeriesRecord], values: np.ndarray, *, held_out: list[int]
    ) -> None:
        path = self.folder / shard_name(len(self._shards))
        batch = SeriesBatch.from_records(records, values, train_fraction=self.train_fraction).batch
        self._shards.append(write_shard(path, batch, held_out=held_out))


def shard_name(number: int) -> str:
    """Name the file of a shard."""
    return f"part-{number:05d}.arrow"


def write_shard(path: Path, batch: pa.RecordBatch, *, held_out: list[int]) -> ShardEntry:
    """Write one shard, whole or not at all.

    Raises:
        DataError: if it cannot be written.
    """
    with (
        durable_file(path, batch.nbytes) as partial,
        partial.open("wb") as file,
        pa.ipc.new_file(file, SCHEMA) as shard,
    ):
        shard.write_batch(batch)
    return ShardEntry(
        file=path.name,
        rows=batch.num_rows,
        points=len(batch.column("target").values),
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        held_out=held_out,
    )


def file_sha256(path: Path) -> str:
    """Hash the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
