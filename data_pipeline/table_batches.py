"""Reading the columns of a table in batches, CSV or Parquet, with memory that does not grow.

Types are inferred from the first rows. Later rows must keep to them; one that does not is named.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.table_file import (
    check_names,
    check_width,
    csv_error,
    csv_options,
    is_parquet,
    parquet_error,
    without_row_numbers,
)

_ROWS_AT_ONCE = 65_536
_READ_BYTES = 2**20


class TableBatches(Protocol):
    """An opened table, of which the first rows have been read."""

    path: Path
    head: pa.Table
    """The first rows, with the types that all rows have."""
    head_is_all: bool

    def batches(self, kinds: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        """Read some columns from the first row on.

        Args:
            kinds: the type to read each column as, where the file leaves that open.

        Raises:
            DataError: if a row cannot be read.
        """
        ...


def open_table_batches(path: Path) -> TableBatches:
    """Open a table by the name of its file.

    Raises:
        DataError: if it cannot be read, is empty, or names a column twice.
    """
    table: TableBatches = _ParquetBatches(path) if is_parquet(path) else _CsvBatches(path)
    if table.head.num_rows == 0:
        raise DataError(f"{path}: the table is empty, it has columns but no rows")
    check_names(table.head.column_names, path)
    table.head = without_row_numbers(table.head)
    return table


class _ParquetBatches:
    def __init__(self, path: Path) -> None:
        self.path = path
        batches = self._batches(None)
        try:
            self.head = next(batches, pa.table({}))
            self.head_is_all = next(batches, None) is None
        finally:
            batches.close()

    def batches(self, kinds: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        yield from self._batches(list(kinds))

    def _batches(self, columns: Sequence[str] | None) -> Generator[pa.Table]:
        try:
            # The default reads row groups ahead, and one may be the whole file.
            with pq.ParquetFile(
                self.path,
                pre_buffer=False,
                buffer_size=_READ_BYTES,
                page_checksum_verification=True,
            ) as file:
                check_width(file.metadata.num_columns, self.path)
                rows = file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False)
                for batch in rows:
                    batch.validate(full=True)
                    yield pa.table(batch)
        except DataError:
            raise
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise parquet_error(self.path, error) from error


class _CsvBatches:
    def __init__(self, path: Path) -> None:
        self.path = path
        batches = self._batches(csv.ConvertOptions(strings_can_be_null=True))
        try:
            self.head = next(batches, pa.table({}))
            self.head_is_all = next(batches, None) is None
        finally:
            batches.close()

    def batches(self, kinds: Mapping[str, pa.DataType]) -> Iterator[pa.Table]:
        # Text stays text: "NA" is also the code of Namibia.
        yield from self._batches(
            csv.ConvertOptions(
                strings_can_be_null=False, include_columns=list(kinds), column_types=dict(kinds)
            )
        )

    def _batches(self, convert_options: csv.ConvertOptions) -> Generator[pa.Table]:
        read_options, parse_options = csv_options(self.path)
        # Rows are numbered in errors only if one thread reads them.
        read_options.use_threads = False
        try:
            with csv.open_csv(
                self.path,
                read_options=read_options,
                parse_options=parse_options,
                convert_options=convert_options,
            ) as reader:
                for batch in reader:
                    if batch.num_rows:
                        yield pa.table(batch)
        except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
            raise csv_error(self.path, error) from error
