"""Opening the file of a wide table, CSV or Parquet, as Arrow columns with inferred types."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import pyarrow.csv as csv

MAX_COLUMNS = 100_000
"""Most columns of a table: more is a table that was turned on its side, and takes all memory."""

_PARQUET_SUFFIXES = (".parquet", ".pq")
_SEPARATORS = (",", ";", "\t")
_MAX_HEADER_BYTES = 8 * 2**20
_BLOCK_BYTES = 2**20
_ROWS_IN_BLOCK = 16
"""A block must hold at least two rows; a row of numbers may be longer than the header."""


def read_columns(path: Path) -> pa.Table:
    """Read all columns of a file, without the nameless row numbers that pandas may have added.

    Raises:
        DataError: if the file is missing, unreadable, empty, or names a column twice.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one CSV or Parquet file")
    table = _read_parquet(path) if is_parquet(path) else _read_csv(path)
    if table.num_rows == 0:
        raise DataError(f"{path}: the table is empty, it has columns but no rows")
    check_names(table.column_names, path)
    return without_row_numbers(table)


def is_parquet(path: Path) -> bool:
    """Tell by the name whether a table is Parquet; all others are CSV."""
    return path.suffix.lower() in _PARQUET_SUFFIXES


def check_names(names: Sequence[str], path: Path) -> None:
    """Refuse a header that names two columns alike.

    Raises:
        DataError: naming the column.
    """
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} stands twice in the header; rename one")


def check_width(count: int, path: Path) -> None:
    """Refuse a table with more columns than any has variates.

    Raises:
        DataError: naming the limit.
    """
    if count > MAX_COLUMNS:
        raise DataError(
            f"{path}: {count} columns or more, at most {MAX_COLUMNS} can be read; a table has one "
            f"row per time: turn it round, or write one series per row as Parquet"
        )


def parquet_error(path: Path, error: Exception) -> DataError:
    """Return what to say of a file that pyarrow cannot read as Parquet."""
    return DataError(
        f"{path}: cannot be read as Parquet ({one_line(error)}); "
        f"copy or export the file again, or rename it if it is not Parquet"
    )


def csv_error(path: Path, error: Exception) -> DataError:
    """Return what to say of a file that pyarrow cannot read as CSV."""
    # Arrow counts the header as the first row.
    reason = re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", one_line(error))
    return DataError(
        f"{path}: cannot be read as CSV ({reason}); every line needs as many fields as the header, "
        f"and all text must be UTF-8"
    )


def one_line(error: Exception) -> str:
    """Put the text of an error on one line, for a message that quotes it."""
    return " ".join(str(error).split()) or type(error).__name__


def csv_options(path: Path) -> "tuple[csv.ReadOptions, csv.ParseOptions]":
    """Look at the header of a CSV, and at no more, and say how to read the file.

    Raises:
        DataError: if there is no header, or one that no table has.
    """
    import pyarrow.csv as csv

    with path.open("rb") as file:
        header = file.readline(_MAX_HEADER_BYTES + 1)
    if not header:
        raise DataError(f"{path}: the file is empty; a CSV needs a header line and rows")
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        separator = max(_SEPARATORS, key=lambda sign: header.count(sign.encode()))
        column = header.count(separator.encode(), 0, error.start) + 1
        raise DataError(
            f"{path}: the header is not UTF-8, from column {column} on "
            f"({header[error.start : error.start + 8]!r}); save the file as UTF-8, or rename it if "
            f"it is not CSV"
        ) from error
    separator = max(_SEPARATORS, key=text.count)
    check_width(text.count(separator) + 1, path)
    if len(header) > _MAX_HEADER_BYTES:
        raise DataError(
            f"{path}: the header is longer than {_MAX_HEADER_BYTES} bytes; a CSV has lines, the "
            f"first of them with the names of the columns"
        )
    block_bytes = max(_BLOCK_BYTES, _ROWS_IN_BLOCK * len(header))
    return csv.ReadOptions(block_size=block_bytes), csv.ParseOptions(delimiter=separator)


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            check_width(file.metadata.num_columns, path)
            table = file.read()
        table.validate(full=True)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise parquet_error(path, error) from error
    return table


def _read_csv(path: Path) -> pa.Table:
    import pyarrow.csv as csv

    read_options, parse_options = csv_options(path)
    try:
        table = csv.read_csv(
            path,
            read_options=read_options,
            parse_options=parse_options,
            convert_options=csv.ConvertOptions(strings_can_be_null=True),
        )
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise csv_error(path, error) from error
    return table


def without_row_numbers(table: pa.Table) -> pa.Table:
    """Leave out a first column without a name (or pandas' name for its index) counting from 0."""
    name = table.column_names[0]
    column = table.column(0)
    if name not in ("", "Unnamed: 0", "__index_level_0__"):
        return table
    if not pa.types.is_integer(column.type) or table.num_columns == 1:
        return table
    counts = pa.array(range(table.num_rows), pa.int64())
    return table.remove_column(0) if pc.all(pc.equal(column, counts)).as_py() else table
