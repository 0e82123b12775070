"""Data sets of GluonTS in Arrow or Parquet, as `gluonts.dataset.arrow` writes them.

One series per row, with `target`, `start` and perhaps `item_id`; features are left alone. A target
of several variates is stored flat, with its shape in the column `target._np_shape`, or as lists
of lists. Compared with files of gluonts 0.17.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.frequency import modern_alias
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.arrow_stream import check_stream_end
from data_pipeline.sources.blocks import Blocks
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.names import one_line
from data_pipeline.sources.rows import TARGET, RowReader
from data_pipeline.sources.unit import Unit

_SHAPE = f"{TARGET}._np_shape"
_ITEM_ID = "item_id"
_FREQ = "freq"
_ROWS_AT_ONCE = 64
_READ_BYTES = 2**20
_ARROW_FILE = b"ARROW1"
_PARQUET_FILE = b"PAR1"


@dataclass(frozen=True, kw_only=True)
class GluontsSource(FileSource):
    """One or many files of GluonTS: Arrow in the file or the stream format, or Parquet.

    The frequency is taken from the column `freq`, or else from the entry `freq` of the file's
    metadata. A series without `item_id` is called after the file, its batch and its row in there.
    """

    type: Literal["gluonts"] = "gluonts"

    def units(self) -> tuple[Unit, ...]:
        """Cut each file into ranges of batches or row groups; a stream is one unit."""
        units: list[Unit] = []
        for file in self.files():
            blocks = _opened(file).blocks
            if not blocks.count:
                raise _empty(file)
            units += blocks.units(str(file), value_bytes=blocks.size_bytes)
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield the series of one unit; memory is that of 64 series, or of one packed batch."""
        file = _opened(Path(unit.file))
        reader = RowReader(
            where=str(file.path),
            name=file.path.stem,
            domain=self.domain,
            source=self.source,
            freq=self.freq or _stated_freq(file.schema),
        )
        first, end = file.blocks.bounds(unit.part)
        # Not around `yield`: what the reader of the series does wrong is no fault of the file.
        rows = file.rows(first, end)
        while True:
            with _errors_name(file.path):
                batch = next(rows, None)
            if batch is None:
                return
            yield from reader.read(batch)


class _ArrowFile:
    """Batches that can be read in any order; values are mapped, unless they are packed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            self.schema = reader.schema
            count = reader.num_record_batches
        self.blocks = Blocks(count=count, size_bytes=path.stat().st_size)

    def rows(self, first: int, end: int) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(self.path)) as mapped, pa.ipc.open_file(mapped) as reader:
            for number in range(first, end):
                yield from _slices(reader.get_batch(number), self.path, number)


class _ArrowStream:
    """Batches that can only be read from the front."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.OSFile(str(path)) as handle:
            self.schema = pa.ipc.open_stream(handle).schema
        check_stream_end(path)
        self.blocks = Blocks(count=1, size_bytes=path.stat().st_size)

    def rows(self, first: int, end: int) -> Iterator[pa.RecordBatch]:  # noqa: ARG002
        with pa.OSFile(str(self.path)) as handle, pa.ipc.open_stream(handle) as reader:
            count = 0
            for number, batch in enumerate(reader):
                yield from _slices(batch, self.path, number)
                count += batch.num_rows
        if not count:
            raise _empty(self.path)


class _ParquetFile:
    """Row groups, each read in small pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pq.ParquetFile(path) as file:
            self.schema = file.schema_arrow
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            size = sum(group.total_byte_size for group in groups)
            # A file without rows has one row group, or none.
            count = len(groups) if file.metadata.num_rows else 0
        self.blocks = Blocks(count=count, size_bytes=size)

    def rows(self, first: int, end: int) -> Iterator[pa.RecordBatch]:
        # The default reads whole row groups ahead.
        with pq.ParquetFile(self.path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
            for number in range(first, end):
                start = 0
                batches = file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[number])
                for batch in batches:
                    batch.validate(full=True)
                    yield _with_names(_unflattened(batch, self.path), self.path, number, start)
                    start += batch.num_rows


def _opened(path: Path) -> _ArrowFile | _ArrowStream | _ParquetFile:
    with _errors_name(path):
        file = _by_head(path)
        _check_columns(file.schema, path)
        return file


def _by_head(path: Path) -> _ArrowFile | _ArrowStream | _ParquetFile:
    with path.open("rb") as file:
        head = file.read(len(_ARROW_FILE))
    if head == _ARROW_FILE:
        return _ArrowFile(path)
    if head.startswith(_PARQUET_FILE):
        return _ParquetFile(path)
    return _ArrowStream(path)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a data set of GluonTS in Arrow or Parquet "
            f"({one_line(error)}); write it again"
        ) from error


def _check_columns(schema: pa.Schema, path: Path) -> None:
    """Raise DataError if there is no target, and UnicodeDecodeError if a name is no UTF-8."""
    if TARGET not in schema.names:
        raise DataError(
            f"{path}: no column 'target' with the values of a series; columns: "
            f"{', '.join(schema.names)}"
        )
    if _SHAPE not in schema.names:
        return
    for name in (TARGET, _SHAPE):
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise DataError(f"{path}: the column {name!r} holds {kind}, expected lists of numbers")


def _empty(path: Path) -> DataError:
    return DataError(f"{path}: holds no series; leave it out, or write it again")


def _stated_freq(schema: pa.Schema) -> str | None:
    """Return the frequency in the metadata, unless each row has its own."""
    if _FREQ in schema.names:
        return None
    stated = (schema.metadata or {}).get(_FREQ.encode(), b"")
    return modern_alias(stated.decode("utf-8", "replace"))


def _slices(batch: pa.RecordBatch, path: Path, number: int) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        rows = _unflattened(batch.slice(start, _ROWS_AT_ONCE), path)
        yield _with_names(rows, path, number, start)


def _with_names(batch: pa.RecordBatch, path: Path, number: int, start: int) -> pa.RecordBatch:
    """Name rows that have no name, so that names do not depend on what else is read."""
    if _ITEM_ID in batch.schema.names:
        return batch
    names = [f"{path.stem}_{number}_{start + row}" for row in range(batch.num_rows)]
    return batch.append_column(_ITEM_ID, pa.array(names, pa.string()))


def _unflattened(batch: pa.RecordBatch, path: Path) -> pa.RecordBatch:
    """Give a flat target its variates back."""
    if _SHAPE not in batch.schema.names:
        return batch
    target = batch.column(TARGET)
    lengths = target.value_lengths().to_pylist()
    shapes = batch.column(_SHAPE).to_pylist()
    for length, shape in zip(lengths, shapes, strict=True):
        fits = shape is not None and len(shape) == 2 and None not in shape
        if not fits or min(shape) < 0 or shape[0] * shape[1] != length:
            raise DataError(
                f"{path}: a target of {length} values has the shape {shape}, expected variates x "
                f"time with as many; write it again"
            )
    counts = np.array([variates for variates, _ in shapes], np.int64)
    steps = np.repeat(np.array([steps for _, steps in shapes], np.int64), counts)
    variates = pa.LargeListArray.from_arrays(_offsets(steps), target.flatten())
    nested = pa.LargeListArray.from_arrays(_offsets(counts), variates)
    index = batch.schema.get_field_index(TARGET)
    return batch.set_column(index, TARGET, nested)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
