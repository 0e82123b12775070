"""Telling the columns of a long table apart: names of series, time, and values."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.table import first_text, is_numeric
from data_pipeline.table_batches import TableBatches
from data_pipeline.time_column import is_text, parse_times, pick_time_column

ID_NAMES = ("item_id", "unique_id", "series", "series_id", "entity", "id")
"""What the column that names series is usually called, best first; case does not matter."""


@dataclass(frozen=True, kw_only=True)
class LongColumns:
    """Which columns say what."""

    ids: tuple[str, ...]
    """Together they tell series apart."""
    time: str
    variates: tuple[str, ...]

    def kinds(self, head: pa.Table) -> dict[str, pa.DataType]:
        """Return the type to read each column as, wide enough for rows that were not seen yet."""
        names = {name: pa.string() for name in self.ids}
        return names | {
            name: _wide_enough(head.schema.field(name).type, is_time=name == self.time)
            for name in (self.time, *self.variates)
        }


def find_long_columns(
    table: TableBatches,
    *,
    id_columns: Sequence[str] | None,
    time_column: str | None,
    columns: Sequence[str] | None,
    is_required: bool,
) -> LongColumns | None:
    """Find the columns of a long table, or return None if it is a wide one.

    Args:
        table: its first rows decide.
        id_columns: the user's choice, or None.
        time_column: the user's choice, or None.
        columns: the user's choice of values, or None for all others.
        is_required: the user says that it is long.

    Raises:
        ConfigError: if an option names a column that is not there, or one is needed.
        DataError: if a column that is left for values holds none.
    """
    head, path = table.head, table.path
    chosen = (*(id_columns or ()), *([time_column] if time_column else ()), *(columns or ()))
    for name in chosen:
        if name not in head.column_names:
            if not is_required:
                return None  # the reader of wide tables says so
            raise ConfigError(
                f"{path} has no column {name!r}; columns there: {', '.join(head.column_names[:20])}"
            )
    ids = tuple(id_columns or _usual_ids(head, chosen, takes_any_type=is_required))
    if not ids:
        if not is_required:
            return None
        raise ConfigError(
            f"id_columns: {path} has no column called {', '.join(ID_NAMES)}; name those that tell "
            f"its series apart, of {', '.join(head.column_names[:20])}"
        )
    time = pick_time_column(head, path, time_column=time_column, variates=(*ids, *(columns or ())))
    if time is None:
        if not is_required:
            return None
        raise ConfigError(
            f"time_column: no column of {path} holds times; a long table needs one, name it"
        )
    if not is_required and not _repeats(table, ids, time):
        return None
    others = [name for name in head.column_names if name not in (*ids, time)]
    found = LongColumns(ids=ids, time=time, variates=tuple(columns or others))
    _check(found, table)
    return found


def _usual_ids(head: pa.Table, chosen: Sequence[str], *, takes_any_type: bool) -> list[str]:
    """Return the best of the usual names, of a column that holds text; at most one."""
    found = [
        name
        for name in head.column_names
        if name.lower() in ID_NAMES and name not in chosen
        if takes_any_type or is_text(head.schema.field(name).type)
    ]
    return sorted(found, key=lambda name: ID_NAMES.index(name.lower()))[:1]


def _repeats(table: TableBatches, ids: Sequence[str], time: str) -> bool:
    """Tell whether times come again, as they do where series stand below one another."""
    head = table.head
    column = head.column(time)
    if column.null_count:
        return False
    stamps, _ = parse_times(column, f"{table.path}, column {time!r}")
    if len(np.unique(stamps)) < len(stamps) or bool((np.diff(stamps).astype(np.int64) < 0).any()):
        return True
    # The first series may be longer than what was read.
    return not table.head_is_all and len(head.column(ids[0]).unique()) == 1


def _check(columns: LongColumns, table: TableBatches) -> None:
    every = (*columns.ids, columns.time, *columns.variates)
    if len(set(every)) < len(every):
        raise ConfigError(
            f"id_columns, time_column and columns of {table.path} share a column: "
            f"{', '.join(every)}"
        )
    if not columns.variates:
        raise DataError(
            f"{table.path}: no column of values beside {', '.join(every)}; a long table has one "
            f"for each variate"
        )
    for name in columns.variates:
        column = table.head.column(name)
        if not is_numeric(column.type):
            row, value = first_text(column)
            raise DataError(
                f"{table.path}, column {name!r}, row {row}: {value!r} is not a number; name the "
                f"column under id_columns if it tells series apart, or name the columns to read"
            )


def _wide_enough(kind: pa.DataType, *, is_time: bool) -> pa.DataType:
    if is_time:
        if pa.types.is_timestamp(kind):
            return pa.timestamp("us", kind.tz)
        if pa.types.is_date(kind):
            return pa.timestamp("us")
        return kind
    is_whole_or_empty = pa.types.is_integer(kind) or pa.types.is_null(kind)
    return pa.float64() if is_whole_or_empty else kind
