"""Finding the time column of a table and reading it as datetime64[us] in UTC."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

TIME_NAMES = ("date", "datetime", "timestamp", "time", "ds")
"""What time columns are usually called, best first; case does not matter."""

_EPOCH_UNITS = ((1e8, "s"), (1e11, "ms"), (1e14, "us"), (1e17, "ns"))
"""Smallest whole number taken for an epoch in each unit: from March 1973 on in all of them."""


def pick_time_column(
    table: pa.Table, path: Path, *, time_column: str | None, variates: Sequence[str] = ()
) -> str | None:
    """Name the column that holds the time, or None if the table has none.

    Args:
        table: all columns of the file.
        path: for messages.
        time_column: the user's choice, known to exist.
        variates: columns that the user wants as values, and that are therefore not the time.

    Raises:
        DataError: if the chosen column cannot hold times.
    """
    if time_column is not None:
        column = table.column(time_column)
        if not (_is_date(column.type) or _is_text(column.type) or _epoch_unit(column)):
            raise DataError(
                f"{path}, column {time_column!r}: {column.type} values such as "
                f"{column[0].as_py()} are not times; choose another time column"
            )
        return time_column
    names = [name for name in table.column_names if name not in variates]
    for name in names:
        if _is_date(table.column(name).type):
            return name
    usual = sorted(
        (name for name in names if name.lower() in TIME_NAMES),
        key=lambda name: TIME_NAMES.index(name.lower()),
    )
    for name in usual:
        column = table.column(name)
        if _is_text(column.type) or _epoch_unit(column):
            return name
    if names and names[0] == table.column_names[0]:
        column = table.column(0)
        if _is_text(column.type) and _parses(column[0].as_py()):
            return names[0]
    return None


def parse_times(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """Read a column as datetime64[us].

    Raises:
        DataError: naming the first row that is empty or not a time.
    """
    if column.null_count:
        row = int(np.flatnonzero(pc.is_null(column).to_numpy())[0])
        raise DataError(f"{where}, row {row + 1}: the time is empty; every row needs one")
    if _is_date(column.type):
        naive = pa.timestamp("us")  # a zoned timestamp is stored in UTC: the zone is dropped
        return column.cast(naive, safe=False).to_numpy().astype("datetime64[us]")
    if pa.types.is_integer(column.type):
        stamps = column.to_numpy().astype(f"datetime64[{_epoch_unit(column)}]")
        return stamps.astype("datetime64[us]")
    return _parse_texts(column.cast(pa.string()).to_pandas(), where)


def _parse_texts(texts: "pd.Series", where: str) -> np.ndarray:
    import pandas as pd

    parsed = pd.to_datetime(texts, errors="coerce", utc=True, dayfirst=_is_day_first(texts))
    bad = np.flatnonzero(parsed.isna().to_numpy())
    if bad.size:
        row = int(bad[0])
        raise DataError(
            f"{where}, row {row + 1}: {texts.iloc[row]!r} is not a time in the way the first row "
            f"({texts.iloc[0]!r}) writes it; write all times alike, best as YYYY-MM-DD HH:MM:SS"
        )
    return parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")


def _is_day_first(texts: "pd.Series") -> bool:
    """Tell 31/12/2020 from 12/31/2020 by looking for a first number above 12 in any row."""
    first_numbers = texts.str.extract(r"^\s*(\d{1,2})[/.\-]", expand=False).dropna()
    return bool((first_numbers.astype(int) > 12).any())


def _parses(text: object) -> bool:
    import pandas as pd

    # Plain numbers parse as years, but a first column of "1", "2", .. is no calendar.
    if not isinstance(text, str) or text.strip().isdigit():
        return False
    is_day_first = _is_day_first(pd.Series([text]))
    return not pd.isna(pd.to_datetime(text, errors="coerce", utc=True, dayfirst=is_day_first))


def _is_date(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _epoch_unit(column: pa.ChunkedArray) -> str | None:
    """Guess the unit of whole-number epochs from their size; None if they are no epochs."""
    if not pa.types.is_integer(column.type):
        return None
    smallest = pc.min(column).as_py()
    if smallest is None:
        return None
    units = [unit for threshold, unit in _EPOCH_UNITS if smallest > threshold]
    return units[-1] if units else None
