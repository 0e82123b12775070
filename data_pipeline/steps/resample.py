"""Bringing series to a coarser sampling interval: points fall into bins, each bin becomes a point.

Only coarser: a finer grid would have to be made up.
"""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import ConfigDict

from data_pipeline.grid import continue_grid
from data_pipeline.record import Drop, SeriesRecord

if TYPE_CHECKING:
    from pandas.tseries.offsets import BaseOffset

NO_FREQ = "no_freq"
"""The series has no sampling interval that could be compared with the target."""
NO_START = "no_start"
"""The bins are calendar ones, and the series does not say when it begins."""

_SHARE_BY_DEFAULT = 0.75
_US_PER_DAY = 86_400_000_000
_PERIOD_OF_PREFIX = {"ME": "M", "MS": "M", "QE": "Q", "QS": "Q", "YE": "Y", "YS": "Y"}


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """Which series are brought to a coarser interval, and how."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    freq: str
    """Interval of the result, a pandas alias: a fixed one ("10min", "h", "D") whose bins are
    counted from midnight of the first day, "W-SUN", or a month, quarter or year ("MS", "QE")."""
    aggregate: Literal["mean", "sum", "min", "max", "first", "last"] = "mean"
    """What becomes of the observed points of a bin."""
    min_observed_fraction: float | None = None
    """Share of the steps of a bin that must be observed, in (0, 1], for the bin not to be NaN.

    Null is 1 for a sum, which every missing step would make too small, and 0.75 otherwise. The
    steps before a series begins and after it ends count as missing.
    """
    sources: tuple[str, ...] | None = None
    """Names of the data sets that are resampled; null for all."""
    drops_without_freq: bool = False
    """Drop what cannot be resampled, as `no_freq` or `no_start`; else it stays as it is."""

    def __post_init__(self) -> None:
        if _bins_of(self.freq) is None:
            raise ValueError(
                f"freq {self.freq!r} is no interval to resample to; give a pandas alias of a fixed "
                f"step such as '10min', 'h' or 'D', or one of W-SUN .., MS, ME, QS, QE, YS, YE"
            )
        share = self.min_observed_fraction
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError(f"min_observed_fraction must be in (0, 1], got {share}")
        if share is not None and share < 1.0 and self.aggregate == "sum":
            raise ValueError(
                f"min_observed_fraction is {share}, but a sum over part of a bin is too small; "
                f"leave it out, or set aggregate to mean"
            )

    @property
    def required_fraction(self) -> float:
        """Share of the steps of a bin that must be observed."""
        if self.min_observed_fraction is not None:
            return self.min_observed_fraction
        return 1.0 if self.aggregate == "sum" else _SHARE_BY_DEFAULT


@dataclass(frozen=True)
class _Bins:
    """A kind of bins of time."""

    fixed_us: int | None
    """Their length in microseconds; None for calendar ones."""
    period: str | None = None
    """pandas alias of the period that a calendar bin is."""
    is_stamped_at_end: bool = False


def resample(record: SeriesRecord, config: ResampleConfig) -> SeriesRecord | Drop:
    """Bring a series to the interval of the configuration, if it has a finer one.

    Start and end of the result are the stamps of its first and last bin: the beginning of a bin
    or, as pandas has it for "ME", "QE", "YE" and weeks, its last day.
    """
    if config.sources is not None and record.source not in config.sources:
        return record
    target = _bins_of(config.freq)
    assert target is not None, config.freq  # checked by the config
    step = None if record.freq is None else _nominal_us(record.freq)
    if step is None:
        return _unable(record, NO_FREQ, config)
    target_step = _nominal_us(config.freq)
    assert target_step is not None, config.freq
    if step >= target_step or len(record.values) == 0:
        return record
    fixed = _fixed_us(record.freq or "")
    if record.start is not None:
        stamps, expected, bins = _bins_by_time(record, fixed, target)
    elif fixed and target.fixed_us and target.fixed_us % fixed == 0:
        # Without a calendar the bins begin where the series does.
        per_bin = target.fixed_us // fixed
        bins = np.arange(len(record.values)) // per_bin
        stamps, expected = None, np.full(int(bins[-1]) + 1, per_bin)
    else:
        return _unable(record, NO_START, config)
    values = _aggregate(record.values, bins, expected, config)
    return dataclasses.replace(
        record,
        start=None if stamps is None else stamps[0].item(),
        end=None if stamps is None else stamps[-1].item(),
        freq=config.freq,
        values=values,
    )


def _unable(record: SeriesRecord, reason: str, config: ResampleConfig) -> SeriesRecord | Drop:
    if config.drops_without_freq:
        return Drop(item_id=record.item_id, source=record.source, reason=reason)
    return record


def _bins_by_time(
    record: SeriesRecord, fixed: int | None, target: _Bins
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Assign points to bins by their time.

    Returns:
        the stamp of each bin, how many steps it should hold, and the bin of each point.
    """
    start = np.datetime64(record.start, "us")
    length = len(record.values)
    if fixed:
        steps = start + np.arange(length) * np.timedelta64(fixed, "us")
    else:
        steps = np.concatenate([[start], continue_grid(start, record.freq or "", length - 1)])
    # The ordinals of bins follow each other without holes, so a bin can be told by its distance
    # from the first.
    ordinals = _ordinals(steps, target, start)
    bins = ordinals - ordinals[0]
    num_bins = int(bins[-1]) + 1
    edges = _edges(int(ordinals[0]), num_bins, target, start)
    expected = np.bincount(bins, minlength=num_bins)
    # Inside, a series has all of its steps; the first and last bin may reach beyond it.
    before, after = _steps_around(steps, edges, fixed, record.freq or "")
    expected[0] += before
    expected[-1] += after
    stamps = edges[:-1]
    if target.is_stamped_at_end:
        stamps = edges[1:] - np.timedelta64(_US_PER_DAY, "us")
    return stamps, expected, bins


def _steps_around(
    steps: np.ndarray, edges: np.ndarray, fixed: int | None, freq: str
) -> tuple[int, int]:
    """Count the steps of the series' grid between the edges of the bins and its first and last."""
    lead, trail = steps[0] - edges[0], edges[-1] - steps[-1]
    if fixed:
        step = np.timedelta64(fixed, "us")
        return int(lead // step), int(-(-trail // step)) - 1
    import pandas as pd

    offset = pd.tseries.frequencies.to_offset(freq)
    first, last = pd.Timestamp(edges[0]), pd.Timestamp(edges[-1])
    before = pd.date_range(first, pd.Timestamp(steps[0]), freq=offset, inclusive="left")
    after = pd.date_range(pd.Timestamp(steps[-1]), last, freq=offset, inclusive="neither")
    return len(before), len(after)


def _ordinals(steps: np.ndarray, target: _Bins, start: np.datetime64) -> np.ndarray:
    if target.fixed_us is not None:
        midnight = start.astype("datetime64[D]").astype("datetime64[us]")
        return (steps - midnight) // np.timedelta64(target.fixed_us, "us")
    import pandas as pd

    return pd.DatetimeIndex(steps).to_period(target.period).asi8


def _edges(first: int, num_bins: int, target: _Bins, start: np.datetime64) -> np.ndarray:
    """Return where each bin begins, and where the last one ends, as datetime64[us]."""
    if target.fixed_us is not None:
        midnight = start.astype("datetime64[D]").astype("datetime64[us]")
        return midnight + (first + np.arange(num_bins + 1)) * np.timedelta64(target.fixed_us, "us")
    import pandas as pd

    first_period = pd.Period(ordinal=first, freq=target.period)
    periods = pd.period_range(first_period, periods=num_bins + 1)
    return periods.to_timestamp(how="start").to_numpy().astype("datetime64[us]")


def _aggregate(
    values: np.ndarray, bins: np.ndarray, expected: np.ndarray, config: ResampleConfig
) -> np.ndarray:
    """Make one point of the observed points of each bin."""
    is_observed = ~np.isnan(values)
    observed, rows = values[is_observed], bins[is_observed]
    counts = np.bincount(rows, minlength=len(expected))
    result = np.full(len(expected), np.nan, np.float32)
    if len(observed):
        firsts = np.flatnonzero(np.diff(rows, prepend=-1))  # of each bin that has any
        match config.aggregate:
            case "sum" | "mean":
                totals = np.add.reduceat(observed.astype(np.float64), firsts)
                per_bin = totals / counts[rows[firsts]] if config.aggregate == "mean" else totals
            case "min":
                per_bin = np.minimum.reduceat(observed, firsts)
            case "max":
                per_bin = np.maximum.reduceat(observed, firsts)
            case "first":
                per_bin = observed[firsts]
            case "last":
                per_bin = observed[np.append(firsts[1:], len(observed)) - 1]
        with np.errstate(over="ignore"):  # a sum beyond float32 is infinite, and dropped as that
            result[rows[firsts]] = per_bin
    result[counts < config.required_fraction * expected] = np.nan
    return result


@lru_cache(maxsize=64)
def _bins_of(freq: str) -> _Bins | None:
    fixed = _fixed_us(freq)
    offset = _offset(freq)
    if offset is None:
        return None
    if offset.freqstr.startswith("W-") and offset.n == 1:
        return _Bins(None, offset.freqstr, is_stamped_at_end=True)
    if fixed is not None:
        return _Bins(fixed)
    prefix, _, month = offset.freqstr.partition("-")
    period = _PERIOD_OF_PREFIX.get(prefix)
    if period is None or offset.n != 1:
        return None
    if month:
        # A quarter or year that starts in one month is named after the month it ends in.
        month = _month_before(month) if prefix.endswith("S") else month
        period = f"{period}-{month}"
    return _Bins(None, period, is_stamped_at_end=prefix.endswith("E"))


def _month_before(month: str) -> str:
    months = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
    return months[months.index(month) - 1]


@lru_cache(maxsize=1024)
def _nominal_us(freq: str) -> int | None:
    """Length of an interval in microseconds, on average over four years; None if it is none."""
    offset = _offset(freq)
    if offset is None:
        return None
    fixed = _fixed_us(freq)
    if fixed is not None:
        return fixed
    import pandas as pd

    count = len(pd.date_range("2000-01-01", "2004-01-01", freq=offset, inclusive="left"))
    return 1461 * _US_PER_DAY // count if count else 1461 * _US_PER_DAY


@lru_cache(maxsize=1024)
def _fixed_us(freq: str) -> int | None:
    """Length of an interval that is always the same; None for others."""
    import pandas as pd

    offset = _offset(freq)
    match offset:
        case pd.offsets.Day():  # no `Tick` any more in pandas 3
            return offset.n * _US_PER_DAY
        case pd.offsets.Week():
            return offset.n * 7 * _US_PER_DAY
        case pd.offsets.Tick():
            return pd.Timedelta(offset) // pd.Timedelta(1, "us") or None
    return None


@lru_cache(maxsize=1024)
def _offset(freq: str) -> "BaseOffset | None":
    import pandas as pd

    try:
        offset = pd.tseries.frequencies.to_offset(freq)
    except ValueError:
        return None
    return offset if offset is not None and offset.n > 0 else None
