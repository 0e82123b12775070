"""Long tables as a source: one row per series and time, the values of a series below one another.

Where the rows of each series stand together, one series is in memory at a time. Others are sorted,
up to `SORT_BYTES`. A first pass over the names and times says which it is, before anything is
yielded.

N rows   C variates
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.clock import CLOCK_ADVICE, check_clock, check_step, to_utc
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.grid import find_grid
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource
from data_pipeline.sources.long_columns import LongColumns
from data_pipeline.steps.clean import CLOCK_CHANGE, IRREGULAR_TIMES, REPEATED_TIMES
from data_pipeline.table_batches import TableBatches
from data_pipeline.time_column import TimeStyle

SORT_BYTES = 2**30
"""Most memory for the rows of a table in which those of a series do not stand together."""

_SEPARATOR = "/"
_ROW_BYTES = 24
"""Of a row to be sorted: its time, its series and its place, 8 bytes each."""

_log = logging.getLogger(__name__)


def long_records(
    table: TableBatches, columns: LongColumns, config: FileSource, *, time_zone: str | None
) -> Iterator[SeriesRecord | Drop]:
    """Yield the variates of each series, in the order in which the series begin.

    Raises:
        ConfigError: if a zone is given for times that have one.
        DataError: naming the row, if one has no name or time, or if the rows of series are mixed
            and more than can be sorted.
    """
    survey = _survey(table, columns)
    if time_zone is not None and survey.times.has_zone:
        raise ConfigError(f"time_zone: {survey.where} has times with a zone; leave it out")
    maker = _RecordMaker(
        table=table, columns=columns, config=config, time_zone=time_zone, survey=survey
    )
    if survey.first_split_row is None:
        pieces = _joined(_runs(table, columns, survey.times))
    else:
        pieces = _sorted(table, columns, survey)
    for piece in pieces:
        yield from maker.records(piece)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Consecutive rows of one series."""

    name: str
    times: np.ndarray
    values_NC: np.ndarray


@dataclass(kw_only=True)
class _Survey:
    """What the first pass finds out."""

    where: str
    times: TimeStyle
    num_rows: int = 0
    first_split_row: int | None = None
    """Where a series goes on after another, from 0."""
    split_name: str = ""


def _survey(table: TableBatches, columns: LongColumns) -> _Survey:
    where = f"{table.path}, column {columns.time!r}"
    survey = _Survey(where=where, times=TimeStyle(where))
    kinds = columns.kinds(table.head)
    # Hashes and not names: 1 million series take 100 MB at most, however they are called.
    seen: set[int] = set()
    last = None
    for batch in table.batches({name: kinds[name] for name in (*columns.ids, columns.time)}):
        names = _names(batch, columns, table, survey.num_rows)
        for start in _starts(names):
            name = names[int(start)].as_py()
            if name == last:
                continue
            last = name
            if hash(name) in seen and survey.first_split_row is None:
                survey.first_split_row = survey.num_rows + int(start)
                survey.split_name = name
            seen.add(hash(name))
        survey.times.learn(batch.column(columns.time))
        survey.num_rows += batch.num_rows
    return survey


def _names(batch: pa.Table, columns: LongColumns, table: TableBatches, first_row: int) -> pa.Array:
    """Return the name of the series of each row."""
    parts = []
    for name in columns.ids:
        column = batch.column(name)
        column = column.combine_chunks().cast(pa.string())
        is_empty = pc.fill_null(pc.equal(column, ""), True)
        row = pc.index(is_empty, True).as_py()
        if row >= 0:
            raise DataError(
                f"{table.path}, column {name!r}, row {first_row + row + 1}: the name of the series "
                f"is empty; every row needs one"
            )
        parts.append(column)
    return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, _SEPARATOR)


def _starts(names: pa.Array) -> np.ndarray:
    """Return the rows at which another series begins, the first row among them."""
    changes = pc.not_equal(names[1:], names[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(changes) + 1])


def _runs(table: TableBatches, columns: LongColumns, times: TimeStyle) -> Iterator[_Piece]:
    """Yield the rows of each batch, cut where the series changes."""
    row = 0
    for batch in table.batches(columns.kinds(table.head)):
        names = _names(batch, columns, table, row)
        stamps = times.read(batch.column(columns.time))
        values_NC = np.stack(
            [
                batch.column(name).cast(pa.float32(), safe=False).to_numpy()
                for name in columns.variates
            ],
            axis=1,
        )
        starts = _starts(names)
        for start, end in zip(starts, [*starts[1:], len(names)], strict=True):
            yield _Piece(
                name=names[int(start)].as_py(),
                times=stamps[start:end],
                values_NC=values_NC[start:end],
            )
        row += batch.num_rows


def _joined(runs: Iterator[_Piece]) -> Iterator[_Piece]:
    """Join the pieces of each series, which follow one another."""
    pieces: list[_Piece] = []
    for run in runs:
        if pieces and pieces[0].name != run.name:
            yield _join(pieces)
            pieces = []
        pieces.append(run)
    yield _join(pieces)


def _join(pieces: list[_Piece]) -> _Piece:
    return _Piece(
        name=pieces[0].name,
        times=np.concatenate([piece.times for piece in pieces]),
        values_NC=np.concatenate([piece.values_NC for piece in pieces]),
    )


def _sorted(table: TableBatches, columns: LongColumns, survey: _Survey) -> Iterator[_Piece]:
    """Yield whole series of a table in which their rows are mixed, those of a series in order."""
    # Twice: the rows as they came, and in order.
    size = 2 * survey.num_rows * (_ROW_BYTES + 4 * len(columns.variates))
    if size > SORT_BYTES:
        assert survey.first_split_row is not None
        raise DataError(
            f"{table.path}, row {survey.first_split_row + 1}: series {survey.split_name!r} goes on "
            f"after another one, and to sort {survey.num_rows} rows takes {size} bytes, more than "
            f"{SORT_BYTES}; sort the file by {', '.join(columns.ids)} and {columns.time}"
        )
    numbers: dict[str, int] = {}
    runs = list(_runs(table, columns, survey.times))
    codes = [numbers.setdefault(run.name, len(numbers)) for run in runs]
    series_N = np.repeat(codes, [len(run.times) for run in runs])
    order = np.argsort(series_N, kind="stable")
    times = np.concatenate([run.times for run in runs])[order]
    values_NC = np.concatenate([run.values_NC for run in runs])[order]
    del runs
    ends = np.cumsum(np.bincount(series_N))
    for name, start, end in zip(numbers, [0, *ends[:-1]], ends, strict=True):
        yield _Piece(name=name, times=times[start:end], values_NC=values_NC[start:end])


@dataclass(kw_only=True)
class _RecordMaker:
    """Puts whole series on their grids."""

    table: TableBatches
    columns: LongColumns
    config: FileSource
    time_zone: str | None
    survey: _Survey
    _told: set[str] = field(default_factory=set, init=False)

    def records(self, piece: _Piece) -> Iterator[SeriesRecord | Drop]:
        """Yield a record per variate; a series whose times have a fault comes as a `Drop`."""
        source = self.config.source or self.table.path.stem
        where = f"{self.survey.where}, series {piece.name!r}"
        reason = CLOCK_CHANGE
        try:
            times, order = self._ordered(piece.times, where)
            reason = REPEATED_TIMES
            _check_once(times, where)
            reason = CLOCK_CHANGE
            if self.time_zone is None and not self.survey.times.has_zone:
                check_clock(times, where)
            reason = IRREGULAR_TIMES
            grid = find_grid(times, where)
            check_step(times, grid.places, where)
        except DataError as error:
            if reason not in self._told:
                self._told.add(reason)
                _log.warning("%s; series is dropped: %s (told once a file)", error, reason)
            yield Drop(item_id=piece.name, source=source, reason=reason)
            return
        for variate in range(len(self.columns.variates)):
            values = np.full(len(grid.stamps), np.nan, np.float32)
            values[grid.places] = piece.values_NC[order, variate]
            yield SeriesRecord(
                item_id=piece.name,
                start=grid.stamps[0].item(),
                end=grid.stamps[-1].item(),
                freq=self.config.freq or grid.freq,
                domain=self.config.domain or UNKNOWN_DOMAIN,
                source=source,
                variate=variate,
                values=values,
            )

    def _ordered(self, times: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the times in order, and the rows they come from."""
        if self.time_zone is not None:
            # Before they are sorted: the order of the rows tells the two passes of an hour apart.
            times = to_utc(times, self.time_zone, where)
        order = np.argsort(times, kind="stable")
        return times[order], order


def _check_once(times: np.ndarray, where: str) -> None:
    again = np.flatnonzero(np.diff(times) == np.timedelta64(0, "us"))
    if again.size:
        raise DataError(
            f"{where}: {times[again[0]].item()} stands twice; keep one row per series and time; "
            f"{CLOCK_ADVICE}"
        )
