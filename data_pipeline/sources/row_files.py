"""Files with one series per row: Parquet, and Arrow in its file and its stream format.

They are read by pyarrow itself and in small pieces, so that memory stays that of 64 series (of one
batch where Arrow is compressed) and no copy is written. Whatever else the bytes of a file may be,
they end in a `DataError` that names it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.sources.arrow_stream import check_stream_end
from data_pipeline.sources.blocks import UNIT_BYTES
from data_pipeline.sources.names import one_line
from data_pipeline.sources.rows import (
    ROW_COLUMNS,
    ROWS_AT_ONCE,
    TARGET,
    may_hold_series,
    missing_target,
)
from data_pipeline.sources.unit import Unit

ARROW_SUFFIX = ".arrow"

_READ_BYTES = 2**20
_ARROW_FILE = b"ARROW1"


class RowFile(Protocol):
    """An opened file; nothing but its description has been read."""

    path: Path
    columns: tuple[str, ...]

    def units(self) -> tuple[Unit, ...]:
        """List its parts; raises DataError if the file is known to have no rows."""
        ...

    def batches(self, part: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the rows of a part, and the number in the file of the first of each batch."""
        ...


def open_row_file(path: Path) -> RowFile:
    """Open Parquet or Arrow, as the name says.

    Raises:
        DataError: if it is neither, or has no column `target`.
    """
    return ArrowRows(path) if path.suffix == ARROW_SUFFIX else ParquetRows(path)


class ParquetRows:
    """Parquet, in parts of consecutive row groups.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_parquet(path) as file, parquet_errors(path):
            self.columns = tuple(file.schema_arrow.names)
            _check_columns(file.schema_arrow, path)
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            self._groups = [
                _RowGroup(num_rows=group.num_rows, size_bytes=group.total_byte_size)
                for group in groups
            ]
            self._check_groups(file.metadata.num_rows)

    def units(self) -> tuple[Unit, ...]:
        """Group the row groups by what they hold; the last ones may make a small part."""
        if not sum(group.num_rows for group in self._groups):
            raise empty_file(self.path)
        return tuple(
            Unit(file=str(self.path), part=part, size_bytes=sum(g.size_bytes for g in groups))
            for part, groups in enumerate(self._parts())
        )

    def batches(self, part: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Read 64 rows at a time; checksums of pages are verified where there are any."""
        parts = self._parts()
        first_group = sum(map(len, parts[:part]))
        row = sum(group.num_rows for group in self._groups[:first_group])
        end = row + sum(group.num_rows for group in parts[part])
        batches = self._checked_batches(range(first_group, first_group + len(parts[part])))
        # The errors of reading are named in here, not around `yield`: what happens to a series
        # afterwards is no fault of the file.
        while (batch := _next(batches, parquet_errors(self.path))) is not None:
            yield row, batch
            row += batch.num_rows
        if row != end:
            raise DataError(
                f"{self.path}: has {end - row} rows fewer than its footer says; copy or export it "
                f"again"
            )

    def _check_groups(self, num_rows: int) -> None:
        counts = [group.num_rows for group in self._groups]
        is_negative = any(min(g.num_rows, g.size_bytes) < 0 for g in self._groups)
        if is_negative or sum(counts) != num_rows:
            raise DataError(
                f"{self.path}: its footer says {num_rows} rows, and {sum(counts)} in its row "
                f"groups; copy or export it again"
            )

    def _checked_batches(self, groups: range) -> Iterator[pa.RecordBatch]:
        columns = [name for name in ROW_COLUMNS if name in self.columns]
        with open_parquet(self.path) as file:
            for batch in file.iter_batches(
                batch_size=ROWS_AT_ONCE, row_groups=groups, columns=columns, use_threads=False
            ):
                yield _checked(batch)

    def _parts(self) -> list[list["_RowGroup"]]:
        parts: list[list[_RowGroup]] = []
        room = 0
        for group in self._groups:
            if not parts or group.size_bytes > room:
                parts.append([])
                room = UNIT_BYTES
            parts[-1].append(group)
            room -= group.size_bytes
        return parts


@dataclass(frozen=True, kw_only=True)
class _RowGroup:
    num_rows: int
    size_bytes: int
    """Of all columns before compression: covariates count as well, where there are some.

    The size of `target` alone stands in the footer too, but Arrow 26 ends the whole process where
    that part of a footer is broken.
    """


class ArrowRows:
    """Arrow in the file or the stream format, as one part; values are mapped, not copied.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors(), self._reader() as reader:
            self.columns = tuple(reader.schema.names)
            _check_columns(reader.schema, path)

    def units(self) -> tuple[Unit, ...]:
        """Take the file as one part: where its batches begin is known only once they are read."""
        return (Unit(file=str(self.path), size_bytes=self.path.stat().st_size),)

    def batches(self, part: int) -> Iterator[tuple[int, pa.RecordBatch]]:  # noqa: ARG002
        """Yield 64 rows at a time."""
        row = 0
        batches = self._checked_batches()
        while (batch := _next(batches, self._errors())) is not None:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield row + start, batch.slice(start, ROWS_AT_ONCE)
            row += batch.num_rows
        if not row:
            raise empty_file(self.path)

    @contextmanager
    def _reader(self) -> Iterator[pa.RecordBatchFileReader | pa.RecordBatchStreamReader]:
        with self.path.open("rb") as file:
            is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        if not is_file_format:
            check_stream_end(self.path)
        with pa.memory_map(str(self.path)) as mapped:
            opener = pa.ipc.open_file if is_file_format else pa.ipc.open_stream
            with opener(mapped) as reader:
                yield reader

    def _checked_batches(self) -> Iterator[pa.RecordBatch]:
        names = [name for name in ROW_COLUMNS if name in self.columns]
        with self._reader() as reader:
            for batch in _all_batches(reader):
                yield _checked(batch.select(names))

    def _errors(self) -> AbstractContextManager[None]:
        return _named_errors(self.path, "Arrow")


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file so that it is decoded in small pieces, and its checksums are verified.

    Raises:
        DataError: if it is no Parquet file, or cut short.
    """
    with parquet_errors(path):
        # The default reads row groups ahead, and one may be the whole file.
        return pq.ParquetFile(
            path, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
        )


def parquet_errors(path: Path) -> AbstractContextManager[None]:
    """Turn what pyarrow makes of a broken Parquet file into a `DataError`."""
    return _named_errors(path, "Parquet")


def empty_file(path: Path) -> DataError:
    """Return the error for a file without rows."""
    return DataError(f"{path}: holds no rows; leave it out, or export it again")


@contextmanager
def _named_errors(path: Path, form: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    # Broken bytes reach the allocator (MemoryError) and the decoder of names (ValueError) as well.
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{path}: cannot be read as {form} ({one_line(error)}); copy or export it again, or "
            f"rename it if it is of another format"
        ) from error


def _check_columns(schema: pa.Schema, path: Path) -> None:
    for name in ROW_COLUMNS:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} stands twice; rename one")
    if TARGET not in schema.names:
        raise missing_target(str(path), schema.names)
    kind = schema.field(TARGET).type
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if not may_hold_series(kind):
        raise DataError(
            f"{path}: column 'target' holds {kind}, expected lists of numbers, one for each "
            f"variate or one alone; for one column per variate use layout: wide"
        )


def _next(
    batches: Iterator[pa.RecordBatch], errors: AbstractContextManager[None]
) -> pa.RecordBatch | None:
    with errors:
        return next(batches, None)


def _all_batches(
    reader: pa.RecordBatchFileReader | pa.RecordBatchStreamReader,
) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.RecordBatchFileReader):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Check that offsets point into the values, and strip extension types such as Array2D.

    Text goes on as bytes: one name that is not UTF-8 shall cost its own series alone.
    """
    batch.validate()
    for index, field in enumerate(batch.schema):
        column = batch.column(index)
        kind = field.type
        if isinstance(kind, pa.BaseExtensionType):
            column = column.storage
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = column.cast(
                pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
            )
        if column.type != kind:
            batch = batch.set_column(index, field.name, column)
    batch.validate(full=True)
    return batch
