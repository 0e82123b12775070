"""The series of evaluation tables, whatever their layout.

- one series per row: list column `target`, as in a corpus (Parquet),
- one case per row: list column `dims`, one list per variate, as in classification (Parquet),
- long: text columns name the series (`entity`, `split`, ...), the others are its variates,
- wide: one column per variate.

Columns of labels are no series and are left out.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.rows import TARGET
from data_pipeline.table import read_table
from data_pipeline.table_file import read_columns
from data_pipeline.time_column import TIME_NAMES, pick_time_column

CASES = "dims"
LABELS = ("label", "labels", "class", "anomaly", "is_anomaly")
"""Columns that are labels, as are all that end in `_label`."""
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Variate:
    """One series of a table."""

    table: str
    """Path of the file."""
    name: str
    """Its column, its row, or its entity and column."""
    values: np.ndarray
    """float32, one axis; NaN where nothing was observed."""


def read_variates(path: Path) -> Iterator[Variate]:
    """Yield every series of a table.

    Rows of a wide or long table are taken as they stand, one step apart: evaluation counts rows.

    Raises:
        DataError: if the file cannot be read, or a series in it is not numeric.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check --against")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give the files in it, such as {path}/*.parquet")
    schema = _parquet_schema(path)
    if schema is not None and _is_list(schema, TARGET):
        yield from _rows(path)
    elif schema is not None and _is_list(schema, CASES):
        yield from _cases(path)
    else:
        yield from _columns(path)


def _parquet_schema(path: Path) -> pa.Schema | None:
    if path.suffix.lower() not in _PARQUET_SUFFIXES:
        return None
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be read as Parquet ({reason}); copy or export it again"
        ) from error


def _is_list(schema: pa.Schema, name: str) -> bool:
    return name in schema.names and pa.types.is_nested(schema.field(name).type)


def _rows(path: Path) -> Iterator[Variate]:
    source = ParquetSource(path=glob.escape(str(path)), layout="series")
    for row, item in enumerate(source.records(), start=1):
        if isinstance(item, Drop):
            raise DataError(
                f"{path}, series {row} ({item.item_id}): {item.reason}, so it cannot be compared; "
                f"mend or remove the row"
            )
        name = f"{item.item_id}/{item.variate}" if item.variate else item.item_id
        yield Variate(str(path), name, np.ascontiguousarray(item.values, np.float32))


def _cases(path: Path) -> Iterator[Variate]:
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=[CASES]):
            for case in batch.column(CASES):
                row += 1
                for channel, values in enumerate(case.values if case.is_valid else ()):
                    yield Variate(str(path), f"row {row}/{channel}", _numbers(values.values))
    except (pa.ArrowException, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}, row {row}: `{CASES}` must hold one list of numbers per variate ({reason})"
        ) from error


def _numbers(values: pa.Array) -> np.ndarray:
    return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)


def _columns(path: Path) -> Iterator[Variate]:
    """Read a wide or a long table."""
    columns = read_columns(path)
    time_name = _time_column(columns, path)
    texts: list[str] = []
    numbers: list[str] = []
    for field in columns.schema:
        if field.name == time_name or _is_label(field.name):
            continue
        (texts if _is_text(field.type) else numbers).append(field.name)
    if not numbers:
        raise DataError(f"{path}: no column of numbers; columns: {', '.join(columns.column_names)}")
    names, order, ends = _group_rows(columns, texts)
    del columns
    table = read_table(path, columns=numbers, ignores_time=True)
    for group, name in enumerate(names):
        rows = order[ends[group] : ends[group + 1]]
        for index, column in enumerate(table.variates):
            full_name = f"{name}/{column}" if name else column
            yield Variate(str(path), full_name, table.values_LC[rows, index])


def _time_column(columns: pa.Table, path: Path) -> str | None:
    """Name the column that holds the time, if there is one."""
    name = pick_time_column(columns, path, time_column=None)
    if name is None or name.lower() in TIME_NAMES or not _is_text(columns.field(name).type):
        return name
    # Names such as "M-6" can be read as times; but they stand in many rows, and times in one.
    is_distinct = len(pc.unique(columns.column(name))) == columns.num_rows
    return name if is_distinct else None


def _group_rows(
    columns: pa.Table, names: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Sort rows by what the text columns say, keeping their order within a group.

    Returns:
        The names of the groups, the rows group after group, and where each group begins and ends.
    """
    if not names:
        return [""], np.arange(columns.num_rows), np.array([0, columns.num_rows])
    keys = columns.select(list(names)).combine_chunks()
    codes = np.zeros(columns.num_rows, np.int64)
    for name in names:
        encoded = keys.column(name).combine_chunks().dictionary_encode(null_encoding="encode")
        codes = codes * len(encoded.dictionary) + encoded.indices.to_numpy()
        codes = np.unique(codes, return_inverse=True)[1]
    order = np.argsort(codes, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(codes[order], prepend=-1)), len(order))
    firsts = keys.take(order[ends[:-1]]).to_pylist()
    return ["/".join(str(row[name]) for name in names) for row in firsts], order, ends


def _is_label(name: str) -> bool:
    return name.lower() in LABELS or name.lower().endswith("_label")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
