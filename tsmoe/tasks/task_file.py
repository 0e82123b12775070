"""What the files of all tasks share: needed columns, names, train and test, lists of numbers.

Rows are counted from 1, the header of a CSV not included.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from tsmoe.errors import DataError

LISTED_AT_MOST = 20
"""Most names that a message lists."""


def listed(names: Sequence[object]) -> str:
    """Join names for a message; of many, the first ones and how many more there are."""
    shown = " ".join(", ".join(str(name) for name in names[:LISTED_AT_MOST]).split())
    rest = len(names) - LISTED_AT_MOST
    return shown + (f" and {rest} more" if rest > 0 else "")


def require_columns(table: pa.Table, names: Sequence[str], path: Path) -> None:
    """Refuse a file without one of the columns of its layout.

    Raises:
        DataError: naming the missing columns and those that are there.
    """
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path}: no column {listed(missing)}; the layout needs {listed(names)}, columns "
            f"there: {listed(table.column_names)}; rename them or give another file"
        )


def texts(column: pa.ChunkedArray, where: str) -> list[str]:
    """Return the names that a column holds, numbers as they are written.

    Raises:
        DataError: naming the first row without one, or the type if it has no names.
    """
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
        raise DataError(f"{where}, row {row}: empty; every row needs a name there")
    try:
        return column.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: {column.type} values are no names; write them as text"
        ) from error


def read_is_test(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Read a split column: True for the rows of the test part.

    Raises:
        DataError: naming the first row that says neither train nor test.
    """
    splits = np.array(texts(column, where), dtype=object)
    is_test_L = splits == "test"
    others = np.flatnonzero(~is_test_L & (splits != "train"))
    if others.size:
        row = int(others[0])
        raise DataError(
            f"{where}, row {row + 1}: {splits[row]!r} is neither 'train' nor 'test' (rows that "
            f"are neither: {others.size}); rename them or leave them out"
        )
    return is_test_L


def float_lists(column: pa.ChunkedArray, where: str) -> list[np.ndarray]:
    """Return each row's list of numbers as float32; nulls are NaN, a missing list is empty.

    Raises:
        DataError: if the rows are something else.
    """
    rows = _cast(column, pa.large_list(pa.float32()), where)
    return _cut(_numbers(rows.values), rows)


def nested_float_lists(column: pa.ChunkedArray, where: str) -> list[list[np.ndarray]]:
    """Return each row's lists of numbers, one per variate, as float32; nulls as in `float_lists`.

    Raises:
        DataError: if the rows are something else.
    """
    rows = _cast(column, pa.large_list(pa.large_list(pa.float32())), where)
    variates = _cut(_numbers(rows.values.values), rows.values)
    offsets = rows.offsets.to_numpy()
    return [variates[start:end] for start, end in pairwise(offsets.tolist())]


def _cast(column: pa.ChunkedArray, kind: pa.DataType, where: str) -> pa.LargeListArray:
    try:
        return column.cast(kind, safe=False).combine_chunks()
    except pa.ArrowException as error:
        raise DataError(
            f"{where}: {column.type} values cannot be read as {kind}; write the column as that"
        ) from error


def _numbers(values: pa.Array) -> np.ndarray:
    return values.to_numpy(zero_copy_only=False).astype(np.float32)


def _cut(values: np.ndarray, rows: pa.LargeListArray) -> list[np.ndarray]:
    offsets = rows.offsets.to_numpy()  # of the untouched `values`, slices included
    return [values[start:end] for start, end in pairwise(offsets.tolist())]
