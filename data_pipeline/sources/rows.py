"""Tables with one series per row, as UTSD and its relatives have them, turned into records.

Columns: `target` holds the values, flat or one list per variate; `item_id`, `start`, `end`,
`freq`, `domain` and `dataset` (or `source`) are optional. Shared by every source of that layout.
"""

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.frequency import modern_alias
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN
from data_pipeline.sources.names import utsd_names
from data_pipeline.steps.clean import BAD_TIMESTAMP, NOT_NUMERIC, NOT_UTF8

TARGET = "target"
ROW_COLUMNS = ("item_id", "start", "end", "freq", "domain", "dataset", "source", TARGET)
"""All that is read of a row; covariates and the like beside them are left alone."""
ROWS_AT_ONCE = 64
"""Rows are whole series, of up to millions of points each."""

_LIST_CHECKS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


@dataclass(kw_only=True)
class RowReader:
    """Reads batches of rows; counts them, so that a row without a name still gets one.

    A row that cannot be read costs its own series alone: it comes as a `Drop` with the reason.
    """

    where: str
    """File or data set, for messages."""
    name: str
    """Stem of missing names; and source of rows that do not say theirs, unless `data_set` does."""
    data_set: str | None = None
    domain: str | None = None
    source: str | None = None
    freq: str | None = None
    first_row: int = 0
    """Number of the next row, from 0; names of rows that have none end in it."""

    def read(self, batch: pa.RecordBatch) -> Iterator[SeriesRecord | Drop]:
        """Yield every series of a batch; a row that holds none comes as a `Drop`.

        The values of a record are a view of the batch.

        Raises:
            DataError: if there is no column `target`.
        """
        if TARGET not in batch.schema.names:
            raise missing_target(self.where, batch.schema.names)
        rows = _Rows(batch)
        for row in range(batch.num_rows):
            yield from self._read_row(rows, row)
            self.first_row += 1

    def _read_row(self, rows: "_Rows", row: int) -> Iterator[SeriesRecord | Drop]:
        unnamed = f"{self.name}_{self.first_row}"
        try:
            item_id = rows.text("item_id", row) or unnamed
            domain, source = self._names(rows, row, item_id)
            freq = self.freq or modern_alias(rows.text("freq", row))
        except UnicodeDecodeError:
            yield Drop(
                item_id=unnamed, source=self.source or self.data_set or self.name, reason=NOT_UTF8
            )
            return
        variates = rows.values(row)
        if variates is None:
            yield Drop(item_id=item_id, source=source, reason=NOT_NUMERIC)
            return
        try:
            start, end = rows.time("start", row), rows.time("end", row)
        except (ValueError, OverflowError):
            yield Drop(item_id=item_id, source=source, reason=BAD_TIMESTAMP)
            return
        for variate, values in enumerate(variates):
            yield SeriesRecord(
                item_id=item_id,
                start=start,
                end=end,
                freq=freq,
                domain=domain,
                source=source,
                variate=variate,
                values=values,
            )

    def _names(self, rows: "_Rows", row: int, item_id: str) -> tuple[str, str]:
        """Return domain and source: the user's, else the row's, else those in a UTSD item_id."""
        names = utsd_names(item_id)
        domain = self.domain or rows.text("domain", row) or (names and names[0]) or UNKNOWN_DOMAIN
        source = (
            self.source
            or rows.text("dataset", row)
            or rows.text("source", row)
            or (names and names[1])
            or self.data_set
            or self.name
        )
        return domain, source


def missing_target(where: str, columns: Sequence[str]) -> DataError:
    """Return the error for a file without a column of series."""
    listed = " ".join(", ".join(columns[:20]).split())  # a damaged name may hold a line break
    return DataError(
        f"{where}: no column 'target' with the values of a series; columns: {listed}; for one "
        f"column per variate use layout: wide"
    )


def may_hold_series(kind: pa.DataType) -> bool:
    """Tell whether a column holds lists of numbers, or of nothing, at most two around another."""
    depth, inner = _unwrapped(kind)
    return depth in (1, 2) and (_is_number(inner) or pa.types.is_null(inner))


class _Rows:
    """Columns of one batch, converted once and not row by row."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self._columns: dict[str, list[object]] = {}
        self._target = batch.column(TARGET)
        self._depth = _nesting(self._target.type)
        self._is_null = self._target.is_null().to_numpy(zero_copy_only=False)

    def text(self, name: str, row: int) -> str | None:
        """Read a cell as text; raises UnicodeDecodeError if its bytes are none."""
        value = self._column(name)[row]
        if isinstance(value, bytes):
            return value.decode("utf-8")
        return None if value is None else str(value)

    def time(self, name: str, row: int) -> dt.datetime | None:
        """Read a time cell, which may be empty or text; raises ValueError if it is no time."""
        value = self._column(name)[row]
        if isinstance(value, dt.datetime):
            return value
        text = self.text(name, row)
        if not text:
            return None
        import pandas as pd

        stamp = pd.Timestamp(text)
        if stamp is pd.NaT:
            return None
        if stamp.tz is not None:
            stamp = stamp.tz_convert(None)
        return stamp.to_pydatetime(warn=False)

    def values(self, row: int) -> list[np.ndarray] | None:
        """Return one array per variate, or None if the cell holds no numbers."""
        if self._depth == 0 or self._is_null[row]:
            return None
        if self._depth == 1:
            offsets, flat = self._flat
            return [flat[offsets[row] : offsets[row + 1]]]
        variates = self._target[row].values
        if variates.null_count:
            return None
        return [_numbers(variate.values) for variate in variates]

    def _column(self, name: str) -> list[object]:
        if name not in self._columns:
            self._columns[name] = self._read_column(name)
        return self._columns[name]

    def _read_column(self, name: str) -> list[object]:
        if name not in self.batch.schema.names:
            return [None] * self.batch.num_rows
        column = self.batch.column(name)
        kind = column.type
        if pa.types.is_timestamp(kind):
            # Without its zone a stamp is in UTC. Only nanoseconds are rounded: the cast of coarser
            # units would let stamps beyond the range of microseconds wrap around.
            unit = "us" if kind.unit == "ns" else kind.unit
            column = column.cast(pa.timestamp(unit), safe=False)
            return [_python_time(cell) for cell in column]
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            # Files are known to hold text that is not UTF-8 under a type that says it is.
            column = column.cast(
                pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
            )
        return column.to_pylist()

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Offsets and float32 values of a column of flat lists, of this batch only."""
        column = self._target
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.large_list(column.type.value_type))
        offsets = column.offsets.to_numpy().astype(np.int64)
        first, last = int(offsets[0]), int(offsets[-1])
        return offsets - first, _numbers(column.values[first:last])


def _python_time(cell: pa.TimestampScalar) -> dt.datetime | str | None:
    """Return the time, or a text that is none where the year is beyond 9999."""
    try:
        return cell.as_py()
    except OverflowError:
        return f"{cell.value} {cell.type.unit} after 1970"


def _nesting(kind: pa.DataType) -> int:
    """Count how many lists stand around the numbers; 0 if there are no numbers inside."""
    depth, inner = _unwrapped(kind)
    return depth if _is_number(inner) and depth <= 2 else 0


def _unwrapped(kind: pa.DataType) -> tuple[int, pa.DataType]:
    """Count the lists around a type, and return what is inside."""
    depth = 0
    while any(is_list(kind) for is_list in _LIST_CHECKS):
        depth += 1
        kind = kind.value_type
    return depth, kind


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _numbers(values: pa.Array) -> np.ndarray:
    """Return float32 with NaN for empty cells; what is beyond float32 becomes infinite."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
