"""Names of sampling intervals: pandas aliases in their present spelling."""

import re

import numpy as np

_OLD_SPELLINGS = {
    "H": "h",
    "BH": "bh",
    "T": "min",
    "S": "s",
    "L": "ms",
    "U": "us",
    "N": "ns",
    "M": "ME",
    "BM": "BME",
    "Q": "QE",
    "BQ": "BQE",
    "A": "YE",
    "Y": "YE",
    "BA": "BYE",
    "BY": "BYE",
    "AS": "YS",
    "BAS": "BYS",
}
"""Aliases that pandas 2.2 renamed. Data sets such as UTSD still carry the old ones."""

_DAY = np.timedelta64(1, "D").astype("timedelta64[us]")
_WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")


def modern_alias(freq: str | None) -> str | None:
    """Spell a pandas alias the present way: "H" as "h", "15T" as "15min", "M" as "ME".

    An empty string is None; what is not a known old alias comes back as it is.
    """
    if not freq:
        return None
    match = re.fullmatch(r"(\d*)([A-Z]+)(-[A-Z]+)?", freq)
    if match is None or match[2] not in _OLD_SPELLINGS:
        return freq
    return f"{match[1]}{_OLD_SPELLINGS[match[2]]}{match[3] or ''}"


def weekdays(stamps: np.ndarray | np.datetime64) -> np.ndarray:
    """Count the days since Monday, 0 to 6."""
    # 1970-01-01 was a Thursday.
    return (stamps.astype("datetime64[D]").astype(np.int64) + 3) % 7


def step_alias(step: np.timedelta64, first: np.datetime64) -> str:
    """Name a fixed step: "h", "15min", "D", "W-MON" (by the weekday of `first`), "10D".

    Args:
        step: longer than zero, in microseconds.
        first: any stamp of the grid.
    """
    days, rest = divmod(step, _DAY)
    if rest or days < 1:
        import pandas as pd

        return pd.tseries.frequencies.to_offset(pd.Timedelta(step)).freqstr
    if days == 7:
        return f"W-{_WEEKDAYS[int(weekdays(first))]}"
    return "D" if days == 1 else f"{int(days)}D"
