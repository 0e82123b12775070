"""What clocks do to tables: zones, hours that come twice or never, steps that change.

A time without a zone that was read off a wall is ambiguous once a year and wrong by an hour for
half of it. Nothing here guesses: a zone that the user names is applied exactly, and times that
betray a changed clock or a changed step are refused with the row.
"""

from datetime import timedelta

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.grid import most_common

CLOCK_ADVICE = "where clocks change, write the times in UTC or with their offset"

_HOUR = np.timedelta64(1, "h").astype("timedelta64[us]")
_ZONES_OF_RULES = (
    "Europe/Lisbon",
    "Europe/Berlin",
    "Europe/Athens",
    "America/New_York",
    "America/Santiago",
    "Australia/Sydney",
    "Pacific/Auckland",
)
"""One zone for each rule, in local time, by which clocks are set forward."""
_CHANGED_STEP_RUN = 8
"""So many rows in a row that keep the same longer step are another step, and no gaps."""


def to_utc(stamps: np.ndarray, time_zone: str, where: str) -> np.ndarray:
    """Read stamps as local times of a zone; the order tells the two passes of a repeated hour.

    Raises:
        DataError: naming the first row whose hour does not exist, or may be either of two.
    """
    import pandas as pd

    local = pd.DatetimeIndex(stamps)
    as_summer = local.tz_localize(time_zone, ambiguous=np.ones(len(local), bool), nonexistent="NaT")
    missing = np.flatnonzero(as_summer.isna())
    if missing.size:
        row = int(missing[0])
        raise DataError(
            f"{where}, row {row + 1}: there was no {stamps[row].item()} in {time_zone}, clocks "
            f"were set forward; check time_zone"
        )
    try:
        aware = local.tz_localize(time_zone, ambiguous="infer")
    except ValueError as error:
        as_winter = local.tz_localize(time_zone, ambiguous=np.zeros(len(local), bool))
        row = int(np.flatnonzero(as_summer != as_winter)[0])
        raise DataError(
            f"{where}, row {row + 1}: {stamps[row].item()} came twice in {time_zone}, and the rows "
            f"around do not tell which is meant; {CLOCK_ADVICE}"
        ) from error
    return aware.tz_convert(None).to_numpy().astype("datetime64[us]")


def check_clock(stamps: np.ndarray, where: str) -> None:
    """Refuse times without a zone that leave out the hour by which clocks are set forward.

    Only where such hours are at least half of all gaps: a table with many gaps has them there too.

    Args:
        stamps: datetime64[us], strictly increasing.
        where: file and column, for messages.

    Raises:
        DataError: naming the first such row.
    """
    if len(stamps) < 3:
        return
    differences = np.diff(stamps)
    step = most_common(differences)
    before = np.flatnonzero(differences != step)
    if step > _HOUR or not before.size:
        return
    skipped = before[differences[before] == step + _HOUR]
    if 2 * len(skipped) < len(before):
        return
    changes = _set_forward(stamps[skipped] + step)
    if 2 * changes.sum() >= len(before):
        row = int(skipped[np.argmax(changes)]) + 1
        raise DataError(
            f"{where}, row {row + 1}: {stamps[row].item()} follows {stamps[row - 1].item()} as if "
            f"the clock had been set forward, and there is no zone; {CLOCK_ADVICE}, or set "
            f"time_zone (UTC if the rows are really missing)"
        )


def check_step(stamps: np.ndarray, places: np.ndarray, where: str) -> None:
    """Refuse a table whose later rows keep another, longer step.

    Args:
        stamps: datetime64[us] of the rows.
        places: int64, where they stand on the grid.
        where: file and column, for messages.

    Raises:
        DataError: naming the first row of the other step.
    """
    steps = np.diff(places)
    ends = np.flatnonzero(np.diff(steps)) + 1
    starts = np.concatenate([[0], ends])
    lengths = np.diff(np.concatenate([starts, [len(steps)]]))
    for start, length in zip(starts, lengths, strict=True):
        if length >= _CHANGED_STEP_RUN and steps[start] > 1:
            step = timedelta(seconds=(stamps[start + 1] - stamps[start]) / np.timedelta64(1, "s"))
            raise DataError(
                f"{where}, row {start + 1}: from {stamps[start].item()} on, {length} rows follow "
                f"one another by {step}, the others by a {steps[start]}th of that; a series has "
                f"one step: cut the table there, or resample it"
            )


def _set_forward(stamps: np.ndarray) -> np.ndarray:
    """Tell of each time whether there is a rule of clocks by which it never came."""
    import pandas as pd

    index = pd.DatetimeIndex(stamps)
    either = np.ones(len(index), bool)
    lacking = [
        index.tz_localize(zone, ambiguous=either, nonexistent="NaT").isna()
        for zone in _ZONES_OF_RULES
    ]
    return np.any(lacking, axis=0)
