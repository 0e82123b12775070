"""Reading a user's wide table, CSV or Parquet: one row per time, one column per variate.

The table comes back on a regular time grid, with NaN where nothing was observed. Whatever cannot
be read without guessing is refused in one line that names file, column, row and value. Rows are
counted from 1, the header of a CSV not included.

L rows on the grid   C variates
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.clock import CLOCK_ADVICE, check_clock, check_step, to_utc
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.grid import continue_grid, find_grid
from data_pipeline.table_file import read_columns
from data_pipeline.time_column import parse_times, pick_time_column


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A wide table on a regular grid."""

    path: str
    timestamps: np.ndarray | None
    """datetime64[us], strictly increasing without holes; None if the table has no time column."""
    freq: str | None
    """pandas alias of the step, such as "h", "15min", "W-MON" or "MS"; None without a step."""
    variates: tuple[str, ...]
    values_LC: np.ndarray
    """float32; NaN where not observed, and on places of the grid that had no row."""
    time_column: str | None = None
    """Where the timestamps are from; None without them."""

    def continued_timestamps(self, steps: int) -> np.ndarray:
        """Return the stamps that follow the last row.

        Returns:
            datetime64[us], calendar aware; or int64 row numbers (from 0) if there is no time.

        Raises:
            DataError: if the table has a single row and therefore no step.
        """
        num_rows = len(self.values_LC)
        if self.timestamps is None:
            return np.arange(num_rows, num_rows + steps, dtype=np.int64)
        if self.freq is None:
            raise DataError(
                f"{self.path}: a table of one row has no time step to continue; give more rows"
            )
        return continue_grid(self.timestamps[-1], self.freq, steps)


def read_table(
    path: str | Path,
    *,
    time_column: str | None = None,
    columns: Sequence[str] | None = None,
    columns_option: str = "columns",
    ignores_time: bool = False,
    time_zone: str | None = None,
    is_strict: bool = False,
) -> Table:
    """Read a wide table.

    Without `time_column`, time is the first column of a date type; else a column called date,
    datetime, timestamp, time or ds that holds times (whole numbers there are taken for epochs if
    they are large enough); else the first column, if it holds times written as text. Times with
    a zone are converted to UTC. A nameless first column that counts the rows, as pandas writes
    its index, is left out.

    Args:
        path: `.parquet`, `.pq`, or anything else as CSV (separated by comma, semicolon or tab).
        time_column: name of the time column.
        columns: the variates to read, in this order; all other columns if not given.
        columns_option: what the user knows `columns` by, for errors.
        ignores_time: take the rows as they stand, one step apart, and return no timestamps. For
            benchmarks that are counted in rows and whose stamps have faults (the standard
            Weather table has a double one).
        time_zone: the zone that times without one are local to, such as "Europe/Rome"; they are
            taken as they stand if not given.
        is_strict: refuse a table whose times leave out the hour by which clocks are set forward,
            or that goes over to a longer step: a corpus shall not learn that such values are
            missing.

    Raises:
        ConfigError: if an option names a column that is not there, or a zone where times have one.
        DataError: for everything that is wrong with the file.
    """
    path = Path(path)
    table = read_columns(path)
    wanted = None if columns is None else tuple(columns)
    _check_options(table, path, time_column, wanted, columns_option)
    time_name = pick_time_column(table, path, time_column=time_column, variates=wanted or ())
    if wanted is None:
        wanted = tuple(name for name in table.column_names if name != time_name)
    if not wanted:
        raise DataError(
            f"{path}: no numeric column; columns: {_listed(table.column_names)}; "
            f"a table needs one column of numbers per variate"
        )
    values_LC = np.empty((table.num_rows, len(wanted)), np.float32)
    for index, name in enumerate(wanted):
        values_LC[:, index] = _numbers(table, name, path, columns_option)

    if time_name is None or ignores_time:
        return Table(
            path=str(path), timestamps=None, freq=None, variates=wanted, values_LC=values_LC
        )
    where = f"{path}, column {time_name!r}"
    stamps, has_zone = parse_times(table.column(time_name), where)
    if time_zone is not None:
        if has_zone:
            raise ConfigError(f"time_zone: {where} has times with a zone; leave `time_zone` out")
        stamps = to_utc(stamps, time_zone, where)
    _check_order(stamps, where)
    if is_strict and not has_zone and time_zone is None:
        check_clock(stamps, where)
    grid = find_grid(stamps, where)
    if is_strict:
        check_step(stamps, grid.places, where)
    if len(grid.stamps) > len(stamps):
        on_grid_LC = np.full((len(grid.stamps), len(wanted)), np.nan, np.float32)
        on_grid_LC[grid.places] = values_LC
        values_LC = on_grid_LC
    return Table(
        path=str(path),
        timestamps=grid.stamps,
        freq=grid.freq,
        variates=wanted,
        values_LC=values_LC,
        time_column=time_name,
    )


def _check_options(
    table: pa.Table,
    path: Path,
    time_column: str | None,
    columns: tuple[str, ...] | None,
    columns_option: str,
) -> None:
    for option, names in (
        ("time_column", () if time_column is None else (time_column,)),
        (columns_option, columns or ()),
    ):
        for name in names:
            if name not in table.column_names:
                raise ConfigError(
                    f"{option}: {path} has no column {name!r}; "
                    f"columns there: {_listed(table.column_names)}"
                )
    if columns is None:
        return
    if not columns:
        raise ConfigError(f"{columns_option}: an empty list; leave it out to read all columns")
    if len(set(columns)) < len(columns):
        raise ConfigError(f"{columns_option}: a name stands twice in {_listed(columns)}")
    if time_column in columns:
        raise ConfigError(f"{columns_option}: {time_column!r} is the time column and not a variate")


def _numbers(table: pa.Table, name: str, path: Path, columns_option: str) -> np.ndarray:
    """Return one column as float32, or name the first cell that is not a finite number."""
    column = table.column(name)
    if pa.types.is_binary(column.type):
        row, text = _first_not_utf8(column)
        raise DataError(
            f"{path}, column {name!r}, row {row}: {text!r} is not UTF-8; save the file as UTF-8"
        )
    if not is_numeric(column.type):
        row, value = first_text(column)
        numeric = [field.name for field in table.schema if is_numeric(field.type)]
        advice = f"the numeric ones are {_listed(numeric)}" if numeric else "there are none"
        raise DataError(
            f"{path}, column {name!r}, row {row}: {value!r} is not a number; mend the cell, leave "
            f"it empty, or name the columns to read by {columns_option} ({advice})"
        )
    numbers = column.cast(pa.float32(), safe=False).to_numpy()
    infinite = np.flatnonzero(np.isinf(numbers))
    if infinite.size:
        row = int(infinite[0])
        raise DataError(
            f"{path}, column {name!r}, row {row + 1}: {column[row].as_py()} is infinite or beyond "
            f"float32; leave the cell empty if the value is missing"
        )
    return numbers


def is_numeric(kind: pa.DataType) -> bool:
    """Tell whether the values of a type can be read as numbers."""
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)  # a column of empty cells: nothing observed
    )


def first_text(column: pa.ChunkedArray) -> tuple[int, object]:
    """Find the first cell that is not a number: its row from 1, and its value."""
    for row, value in enumerate(column.to_pylist(), start=1):
        if value is None:
            continue
        try:
            float(value)
        except (TypeError, ValueError):
            return row, value
    return 1, column[0].as_py()


def _first_not_utf8(column: pa.ChunkedArray) -> tuple[int, bytes]:
    """Find the first cell whose bytes are no text, in a column that was taken for bytes by it."""
    for row, value in enumerate(column.to_pylist(), start=1):
        try:
            (value or b"").decode("utf-8")
        except UnicodeDecodeError:
            return row, value
    return 1, column[0].as_py()


def _check_order(stamps: np.ndarray, where: str) -> None:
    """Refuse stamps that go back or stand still."""
    differences = np.diff(stamps)
    back = np.flatnonzero(differences < np.timedelta64(0, "us"))
    if back.size:
        row = int(back[0]) + 1
        raise DataError(
            f"{where}: row {row + 1} ({stamps[row].item()}) is earlier than row {row} "
            f"({stamps[row - 1].item()}); sort the table by time, and if several series stand "
            f"below one another give each its own column; {CLOCK_ADVICE}"
        )
    same = np.flatnonzero(differences == np.timedelta64(0, "us"))
    if same.size:
        row = int(same[0]) + 1
        raise DataError(
            f"{where}: {stamps[row].item()} stands twice, in rows {row} and {row + 1}; "
            f"keep one row per time; {CLOCK_ADVICE}"
        )


def _listed(names: Sequence[str]) -> str:
    shown = " ".join(", ".join(names[:20]).split())  # a name may hold a line break
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
