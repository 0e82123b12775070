"""The table of all series that a build has seen, kept or dropped: one Parquet row each.

A block of a build writes a table of its own; merging strings them together. Both hold a bounded
number of rows in memory.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.steps.quality import Measurements

CURATION_FOLDER = "curation"
CURATION_TABLE = f"{CURATION_FOLDER}/series.parquet"
"""Where a corpus keeps its table."""

MEASURES = (
    "missing_fraction",
    "longest_gap_fraction",
    "constant_fraction",
    "clipped_fraction",
    "spike_fraction",
    "worst_spike",
    "adf",
    "forecastability",
)
"""The columns that are `Measurements` of the same name."""

SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("freq", pa.string()),
        pa.field("length", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("copy_of", pa.string()),
        *(pa.field(name, pa.float32()) for name in MEASURES),
        pa.field("thumbnail", pa.list_(pa.float32())),
    ]
)
"""Columns of the table. `reason` is null for a series that was kept, `copy_of` names the series of
which a dropped one is a copy, and what was not measured is null. `thumbnail` is the course of the
series in at most 256 values, for the first few of each source and reason."""

THUMBNAILS = 3
"""Series per source and reason that have one."""
THUMBNAIL_POINTS = 256

_ROWS_AT_ONCE = 65_536  # as Arrow columns: about 10 MB
_ROWS_AS_OBJECTS = 4_096


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Why a series that its block had kept is dropped after all."""

    reason: str
    copy_of: str | None = None
    """item_id of the series that stays instead."""


class SeriesTable:
    """Writes the table of one block, row by row; a context manager that closes the file.

    Args:
        path: the Parquet file.
    """

    def __init__(self, path: Path) -> None:
        self._writer = _TableWriter(path)
        self._rows: list[dict[str, Any]] = []  # Any: cells of SCHEMA
        self._pictured: Counter[tuple[str, str | None]] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, record: SeriesRecord, measurements: Measurements, reason: str | None) -> None:
        """Enter a series that was measured, and why it is dropped or None if it is kept."""
        kind = record.source, reason
        self._pictured[kind] += 1
        self._append(
            item_id=record.item_id,
            source=record.source,
            domain=record.domain,
            freq=record.freq,
            length=len(record.values),
            reason=reason,
            thumbnail=thumbnail(record.values) if self._pictured[kind] <= THUMBNAILS else None,
            **{name: _cell(getattr(measurements, name)) for name in MEASURES},
        )

    def add_drop(self, drop: Drop) -> None:
        """Enter a series that never became a record."""
        self._append(item_id=drop.item_id, source=drop.source, reason=drop.reason)

    def close(self) -> None:
        """Write what is left and close the file."""
        self._flush()
        self._writer.close()

    def _append(self, **cells: object) -> None:
        self._rows.append(cells)
        if len(self._rows) == _ROWS_AS_OBJECTS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write(pa.RecordBatch.from_pylist(self._rows, schema=SCHEMA))
        self._rows = []


def merge_tables(
    tables: Sequence[Path], removals: Mapping[int, Mapping[int, Removal]], path: Path
) -> None:
    """String the tables of all blocks together, in order.

    Args:
        tables: one per block.
        removals: by block, and by number among the series that the block kept, those that go.
        path: the Parquet file to write.

    Raises:
        DataError: if a table cannot be read.
    """
    writer = _TableWriter(path)
    pictured: Counter[tuple[str, str | None]] = Counter()
    for number, table in enumerate(tables):
        removed = dict(removals.get(number, {}))
        num_kept = 0
        for batch in read_batches(table):
            batch, num_kept = _remove(batch, removed, num_kept)
            writer.write(_thin_out(batch, pictured))
        if removed:
            raise ValueError(
                f"{table}: has {num_kept} kept series, but number {min(removed)} is to be removed"
            )
    writer.close()


def read_batches(
    table: "str | os.PathLike[str] | pa.NativeFile", columns: Sequence[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Read a table piece by piece.

    Args:
        table: its path, or the open file.
        columns: those to read; all by default.

    Raises:
        DataError: if it cannot be read, or is no such table.
    """
    try:
        file = pq.ParquetFile(table)
        if not file.schema_arrow.equals(SCHEMA):
            raise DataError(f"{table}: is no table of series; build the corpus again")
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{table}: the table of series cannot be read ({reason}); build the corpus again"
        ) from error


def thumbnail(values: np.ndarray) -> np.ndarray:
    """Draw the course of a series in at most 256 points: the extremes of each part, in order."""
    if len(values) <= THUMBNAIL_POINTS:
        return values
    edges = np.linspace(0, len(values), THUMBNAIL_POINTS // 2 + 1).astype(np.int64)
    points = []
    for start, end in pairwise(edges.tolist()):
        part = values[start:end]
        observed = np.flatnonzero(~np.isnan(part))
        if not observed.size:
            points += [math.nan, math.nan]
            continue
        seen = part[observed]
        low, high = int(seen.argmin()), int(seen.argmax())
        points += [seen[min(low, high)], seen[max(low, high)]]
    return np.array(points, np.float32)


class _TableWriter:
    """Collects batches into row groups of a common size."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._batches: list[pa.RecordBatch] = []
        self._num_rows = 0

    def write(self, batch: pa.RecordBatch) -> None:
        self._batches.append(batch)
        self._num_rows += batch.num_rows
        if self._num_rows >= _ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._num_rows:
            self._writer.write_table(pa.Table.from_batches(self._batches, SCHEMA))
        self._batches, self._num_rows = [], 0


def _cell(number: float) -> float | None:
    return None if math.isnan(number) else number


def _remove(
    batch: pa.RecordBatch, removed: dict[int, Removal], num_kept: int
) -> tuple[pa.RecordBatch, int]:
    """Enter the reasons of those that go, and take them out of `removed`; count the kept ones."""
    is_kept = pc.is_null(batch["reason"]).to_numpy(zero_copy_only=False)
    last = num_kept + int(is_kept.sum())
    if not removed:
        return batch, last
    rows = np.flatnonzero(is_kept)
    reasons, copies = batch["reason"].to_pylist(), batch["copy_of"].to_pylist()
    for number in [number for number in removed if number < last]:
        row = int(rows[number - num_kept])
        removal = removed.pop(number)
        reasons[row], copies[row] = removal.reason, removal.copy_of
    return _replace(batch, reason=reasons, copy_of=copies), last


def _thin_out(batch: pa.RecordBatch, pictured: Counter[tuple[str, str | None]]) -> pa.RecordBatch:
    """Leave thumbnails to the first few of each source and reason over all blocks."""
    column = batch["thumbnail"]
    rows = np.flatnonzero(pc.is_valid(column).to_numpy(zero_copy_only=False))
    shown: list[int | None] = [None] * batch.num_rows
    for row in rows.tolist():
        kind = batch["source"][row].as_py(), batch["reason"][row].as_py()
        pictured[kind] += 1
        if pictured[kind] <= THUMBNAILS:
            shown[row] = row
    return _replace(batch, thumbnail=column.take(pa.array(shown, pa.int64())))


def _replace(batch: pa.RecordBatch, **columns: object) -> pa.RecordBatch:
    arrays = [
        pa.array(columns[field.name], field.type) if field.name in columns else batch[field.name]
        for field in SCHEMA
    ]
    return pa.record_batch(arrays, schema=SCHEMA)
