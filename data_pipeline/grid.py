"""The regular time grid behind a list of timestamps, and how it goes on.

A grid is either a fixed step (seconds to weeks) or a calendar step (business days, months,
quarters, years). Stamps may leave places of the grid empty; they may not fall beside it.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.frequency import step_alias, weekdays

MAX_GRID_GROWTH = 4
"""A grid with more places than this times the rows means that the step was not understood."""

_DAY = np.timedelta64(1, "D").astype("timedelta64[us]")
_SHORTEST_MONTH_DAYS = 28
_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Regular stamps, and the place of each row among them."""

    freq: str | None
    """pandas alias; None for a single row, which has no step."""
    stamps: np.ndarray
    """datetime64[us], every place of the grid."""
    places: np.ndarray
    """int64 per row: its position in `stamps`."""


def find_grid(stamps: np.ndarray, where: str) -> Grid:
    """Find the regular grid that holds all stamps.

    Args:
        stamps: datetime64[us], strictly increasing, at least one.
        where: file and column, for messages.

    Raises:
        DataError: if a stamp lies beside the grid, or the grid is mostly holes.
    """
    if len(stamps) == 1:
        return Grid(freq=None, stamps=stamps, places=np.zeros(1, np.int64))
    step = most_common(np.diff(stamps))
    grid = _calendar_grid(stamps, step)
    return grid if grid is not None else _fixed_grid(stamps, step, where)


def continue_grid(last: np.datetime64, freq: str, steps: int) -> np.ndarray:
    """Return the next stamps of a grid, calendar aware, as datetime64[us]."""
    import pandas as pd

    shift = _month_shift(last) if _starts_months(freq) else np.timedelta64(0, "us")
    anchor = pd.Timestamp(last - shift)
    stamps = pd.date_range(anchor, periods=steps + 1, freq=freq)[1:]
    return stamps.to_numpy().astype("datetime64[us]") + shift


def most_common(differences: np.ndarray) -> np.timedelta64:
    """Return the most common of some steps, the shortest of several."""
    lengths, counts = np.unique(differences, return_counts=True)
    return lengths[np.argmax(counts)]


def _fixed_grid(stamps: np.ndarray, step: np.timedelta64, where: str) -> Grid:
    since_first = stamps - stamps[0]
    beside = np.flatnonzero(since_first % step)
    if beside.size:
        row = int(beside[0])
        raise DataError(
            f"{where}, row {row + 1}: {stamps[row].item()} does not fall on the grid that starts "
            f"at {stamps[0].item()} with the most common step of {step.item()}; resample the table "
            f"to a regular step"
        )
    places = (since_first // step).astype(np.int64)
    num_places = int(places[-1]) + 1
    if num_places > MAX_GRID_GROWTH * len(stamps):
        widest = int(np.argmax(np.diff(stamps)))
        raise DataError(
            f"{where}: {len(stamps)} rows spread over {num_places} steps of {step.item()}, "
            f"more than {MAX_GRID_GROWTH} times the rows; the widest gap follows row {widest + 1} "
            f"({stamps[widest].item()}); cut the table there, or resample it to a longer step"
        )
    return Grid(
        freq=step_alias(step, stamps[0]),
        stamps=stamps[0] + step * np.arange(num_places),
        places=places,
    )


def _calendar_grid(stamps: np.ndarray, step: np.timedelta64) -> Grid | None:
    """Try the calendar steps near the most common difference, coarsest first."""
    import pandas as pd

    for freq in _calendar_candidates(stamps, step):
        shift = _month_shift(stamps[0]) if _starts_months(freq) else np.timedelta64(0, "us")
        anchors = pd.DatetimeIndex(stamps - shift)
        grid = pd.date_range(anchors[0], anchors[-1], freq=freq)
        places = grid.get_indexer(anchors)
        if (places >= 0).all() and len(grid) <= MAX_GRID_GROWTH * len(stamps):
            return Grid(
                freq=freq,
                stamps=grid.to_numpy().astype("datetime64[us]") + shift,
                places=places.astype(np.int64),
            )
    return None


def _calendar_candidates(stamps: np.ndarray, step: np.timedelta64) -> list[str]:
    if step == _DAY:
        spans_weekend = stamps[-1] - stamps[0] >= 7 * _DAY
        return ["B"] if spans_weekend and bool((weekdays(stamps) < 5).all()) else []
    if step < _SHORTEST_MONTH_DAYS * _DAY:
        return []
    month = _MONTHS[stamps[0].item().month - 1]
    # Ends before starts: the 31st of every December is also "30 days after the 1st".
    years = [f"YE-{month}", f"BYE-{month}", f"YS-{month}", f"BYS-{month}"]
    quarters = [f"QE-{month}", f"BQE-{month}", f"QS-{month}", f"BQS-{month}"]
    return [*years, *quarters, "ME", "BME", "MS", "BMS"]


def _starts_months(freq: str) -> bool:
    return freq.startswith(("MS", "QS", "YS"))


def _month_shift(stamp: np.datetime64) -> np.timedelta64:
    """Time since the month began: a table stamped on the 15th is a month-start grid, shifted."""
    return stamp - stamp.astype("datetime64[M]").astype("datetime64[us]")
