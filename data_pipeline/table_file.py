"""Opening the file of a wide table, CSV or Parquet, as Arrow columns with inferred types."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import DataError

_PARQUET_SUFFIXES = (".parquet", ".pq")
_SEPARATORS = (",", ";", "\t")


def read_columns(path: Path) -> pa.Table:
    """Read all columns of a file, without the nameless row numbers that pandas may have added.

    Raises:
        DataError: if the file is missing, unreadable, empty, or names a column twice.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one CSV or Parquet file")
    is_parquet = path.suffix.lower() in _PARQUET_SUFFIXES
    table = _read_parquet(path) if is_parquet else _read_csv(path)
    if table.num_rows == 0:
        raise DataError(f"{path}: the table is empty, it has columns but no rows")
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} stands twice in the header; rename one")
    return _without_row_numbers(table)


def _read_parquet(path: Path) -> pa.Table:
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as Parquet ({_one_line(error)}); "
            f"copy or export the file again, or rename it if it is not Parquet"
        ) from error


def _read_csv(path: Path) -> pa.Table:
    import pyarrow.csv as csv

    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; a CSV needs a header line and rows")
    try:
        return csv.read_csv(
            path,
            parse_options=csv.ParseOptions(delimiter=_separator(path)),
            convert_options=csv.ConvertOptions(strings_can_be_null=True),
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: cannot be read as CSV ({_one_line(error)}); "
            f"every line needs as many fields as the header"
        ) from error


def _separator(path: Path) -> str:
    """Take the separator that the header line uses most."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline()
    return max(_SEPARATORS, key=header.count)


def _without_row_numbers(table: pa.Table) -> pa.Table:
    """Leave out a first column without a name (or pandas' name for its index) counting from 0."""
    name = table.column_names[0]
    column = table.column(0)
    if name not in ("", "Unnamed: 0", "__index_level_0__"):
        return table
    if not pa.types.is_integer(column.type) or table.num_columns == 1:
        return table
    counts = pa.array(range(table.num_rows), pa.int64())
    return table.remove_column(0) if pc.all(pc.equal(column, counts)).as_py() else table


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
