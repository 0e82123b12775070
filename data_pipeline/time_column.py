"""Finding the time column of a table and reading it as datetime64[us] in UTC."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.errors import DataError

TIME_NAMES = ("date", "datetime", "timestamp", "time", "ds")
"""What time columns are usually called, best first; case does not matter."""

_EPOCH_UNITS = ((1e8, "s"), (1e11, "ms"), (1e14, "us"), (1e17, "ns"))
"""Smallest whole number taken for an epoch in each unit: from March 1973 on in all of them."""
_ZONE = r":\d\d(\.\d+)?\s*([AaPp][Mm])?\s*(Z|UTC|GMT|[+-]\d\d(:?\d\d)?)\s*$"
_DAY_FIRST = r"^\s*(1[3-9]|[2-9]\d)[/.\-]"
"""A first number above 12 is a day: 31/12/2020, and not 12/31/2020."""


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
        if not (_is_date(column.type) or is_text(column.type) or _epoch_unit(column)):
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
        if is_text(column.type) or _epoch_unit(column):
            return name
    if names and names[0] == table.column_names[0]:
        column = table.column(0)
        if is_text(column.type) and _parses(column[0].as_py()):
            return names[0]
    return None


@dataclass
class TimeStyle:
    """How a column writes its times: learned from all of its rows, before any of them is read.

    Rows that come in batches are then read alike: a batch alone could not tell whether the day or
    the month stands first.
    """

    where: str
    """File and column, for messages."""
    _first_text: str | None = field(default=None, init=False)
    _day_first_text: str | None = field(default=None, init=False)
    """The first that can only be read with the day first, such as 31/12/2020."""
    _smallest: int | None = field(default=None, init=False)
    _has_zone: bool = field(default=False, init=False)
    _rows_learned: int = field(default=0, init=False)
    _rows_read: int = field(default=0, init=False)

    @property
    def has_zone(self) -> bool:
        """Whether times are in UTC or with an offset, as far as they have been learned."""
        return self._has_zone

    def learn(self, column: pa.ChunkedArray) -> None:
        """Look at the next rows.

        Raises:
            DataError: naming the first row that is empty.
        """
        if column.null_count:
            row = int(np.flatnonzero(pc.is_null(column).to_numpy())[0]) + self._rows_learned
            raise DataError(f"{self.where}, row {row + 1}: the time is empty; every row needs one")
        self._rows_learned += len(column)
        if not len(column):
            return
        if pa.types.is_timestamp(column.type):
            self._has_zone = column.type.tz is not None
        elif pa.types.is_integer(column.type):
            smallest = pc.min(column).as_py()
            self._smallest = smallest if self._smallest is None else min(smallest, self._smallest)
            self._has_zone = True  # epochs count from a moment, not from a time on a wall
        elif not pa.types.is_date(column.type):
            self._learn_texts(column)

    def read(self, column: pa.ChunkedArray) -> np.ndarray:
        """Return the next rows as datetime64[us], those with a zone in UTC.

        Raises:
            DataError: naming the first row that is not a time.
        """
        first_row = self._rows_read
        self._rows_read += len(column)
        if _is_date(column.type):
            naive = pa.timestamp("us")  # a zoned timestamp is stored in UTC: the zone is dropped
            return column.cast(naive, safe=False).to_numpy().astype("datetime64[us]")
        if pa.types.is_integer(column.type):
            unit = _epoch_unit_of(self._smallest)
            if unit is None:
                raise DataError(
                    f"{self.where}: whole numbers from {self._smallest} on are no epochs; choose "
                    f"another time column"
                )
            return column.to_numpy().astype(f"datetime64[{unit}]").astype("datetime64[us]")
        return self._read_texts(column, first_row)

    def _learn_texts(self, column: pa.ChunkedArray) -> None:
        texts = _texts(column)
        if self._first_text is None:
            self._first_text = texts[0].as_py()
            self._has_zone = re.search(_ZONE, self._first_text) is not None
        if self._day_first_text is None:
            is_day_first = pc.match_substring_regex(texts, _DAY_FIRST)
            index = pc.index(is_day_first, True).as_py()
            if index >= 0:
                self._day_first_text = texts[index].as_py()

    def _read_texts(self, column: pa.ChunkedArray, first_row: int) -> np.ndarray:
        import pandas as pd

        is_day_first = self._day_first_text is not None
        example = self._day_first_text or self._first_text or ""
        form = _format(example, is_day_first=is_day_first)
        if form is None:
            raise DataError(
                f"{self.where}: {example!r} is not a time with a year, and its date shall not be "
                f"made up; best write YYYY-MM-DD HH:MM:SS"
            )
        texts = _texts(column)
        parsed = pd.to_datetime(
            texts.to_pandas(), errors="coerce", utc=True, format=form, dayfirst=is_day_first
        )
        is_zoned = pc.match_substring_regex(texts, _ZONE).to_numpy()
        bad = np.flatnonzero(parsed.isna().to_numpy() | (is_zoned != self._has_zone))
        if bad.size:
            row = int(bad[0])
            raise DataError(
                f"{self.where}, row {first_row + row + 1}: {texts[row].as_py()!r} is not a time in "
                f"the way {'others are' if is_day_first else 'the first row is'} written "
                f"({example!r}); write all times alike, best as YYYY-MM-DD HH:MM:SS"
            )
        return parsed.dt.tz_localize(None).to_numpy().astype("datetime64[us]")


def parse_times(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, bool]:
    """Read a whole column.

    Returns:
        stamps: datetime64[us], those with a zone in UTC.
        has_zone: whether they have one.

    Raises:
        DataError: naming the first row that is empty or not a time.
    """
    style = TimeStyle(where)
    style.learn(column)
    return style.read(column), style.has_zone


def _format(text: str, *, is_day_first: bool) -> str | None:
    """Return the format of a time, "mixed" if it has no fixed one, None if it has no year."""
    from pandas.tseries.api import guess_datetime_format

    form = guess_datetime_format(text, dayfirst=is_day_first)
    if form is not None:
        return form if re.search("%[Yy]", form) else None
    # What is not written in numbers alone ("1 Jan 2020") is read word by word, and a missing year
    # would be the present one.
    return "mixed" if re.search(r"\d{4}", text) else None


def _texts(column: pa.ChunkedArray) -> pa.ChunkedArray:
    texts = column.cast(pa.string())
    return texts if isinstance(texts, pa.ChunkedArray) else pa.chunked_array([texts])


def _parses(text: object) -> bool:
    import pandas as pd

    # Plain numbers parse as years, but a first column of "1", "2", .. is no calendar.
    if not isinstance(text, str) or text.strip().isdigit():
        return False
    is_day_first = re.match(_DAY_FIRST, text) is not None
    form = _format(text, is_day_first=is_day_first)
    if form is None:
        return False
    parsed = pd.to_datetime(text, errors="coerce", utc=True, format=form, dayfirst=is_day_first)
    return not pd.isna(parsed)


def _is_date(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def is_text(kind: pa.DataType) -> bool:
    """Tell whether a column holds text, dictionary encoded or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _epoch_unit(column: pa.ChunkedArray) -> str | None:
    """Guess the unit of whole-number epochs from their size; None if they are no epochs."""
    if not pa.types.is_integer(column.type):
        return None
    return _epoch_unit_of(pc.min(column).as_py())


def _epoch_unit_of(smallest: int | None) -> str | None:
    if smallest is None:
        return None
    units = [unit for threshold, unit in _EPOCH_UNITS if smallest > threshold]
    return units[-1] if units else None
