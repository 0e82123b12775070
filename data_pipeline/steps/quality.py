"""What is measured of a series before it is kept or dropped: one `Measurements` per series.

Nothing here decides or changes anything: `clean.py` compares the measurements with thresholds, and
the curation report shows them. All of them look at the whole series, as UTSD's do.
"""

import math
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from data_pipeline.steps.dickey_fuller import dickey_fuller
from data_pipeline.steps.split import train_length

FORECASTABILITY_WINDOW = 256
"""Points per window of the forecastability. Source: UTSD's `dataset_evaluation.py`."""

_NAN = math.nan
_CLIPPED_RUN = 3
_FEWEST_LEVELS = 17
_WINDOWS_AT_ONCE = 64
_LARGEST_SQUARED = 1e18
_LARGEST_VALUE = 1e38
_SCALE_OF_MEDIAN = 1.4826  # makes it the standard deviation of normal noise
_SCALE_OF_MEAN = 1.2533


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What is measured of every series; a threshold of `clean` needs its measurement."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    constant_window: int = 128
    """Steps per window of `constant_fraction`.

    Ours, as no paper says: longer than a day of hourly and a night of 10-minute steps, so that dry
    days and dark hours count as life. Time-MoE cleans by windows of the same length.
    """
    spike_size: float = 10.0
    """Height from which a jump and return counts as a spike, in robust standard deviations."""
    measures_clipping: bool = True
    measures_spikes: bool = True
    measures_stationarity: bool = True
    """Compute the ADF statistic: the most expensive measurement of short series."""
    measures_forecastability: bool = True

    def __post_init__(self) -> None:
        if self.constant_window < 2:
            raise ValueError(f"constant_window must be at least 2, got {self.constant_window}")
        if not self.spike_size > 0.0:
            raise ValueError(f"spike_size must be positive, got {self.spike_size}")


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """One series in numbers; NaN where it was not measured or has no such number."""

    length: int
    has_infinite: bool
    train_observed: int
    """Observed points of the training part."""
    train_is_constant: bool
    """The observed points of the training part are all equal."""
    missing_fraction: float
    longest_gap_fraction: float
    """Points of the longest run of missing ones, over the length."""
    constant_fraction: float
    """Share of the windows of `constant_window` steps in which nothing changes."""
    clipped_fraction: float
    """Share of the observed points that lie flat at the end of the range: see `_clipped`."""
    spike_fraction: float
    """Share of the observed points that jump out and back: see `_spikes`."""
    worst_spike: float
    """Height of the highest such jump, in robust standard deviations."""
    adf: float
    """Augmented Dickey-Fuller statistic; the more negative, the more stationary."""
    forecastability: float
    """1 for a spectrum of one line, 0 for a flat one."""


def measure(values: np.ndarray, *, train_fraction: float, config: QualityConfig) -> Measurements:
    """Measure one series.

    Args:
        values: float32, one axis, at any length; NaN means not observed.
        train_fraction: share of the series, from its start, that may be trained on.
        config: what to measure.
    """
    length = len(values)
    missing = np.isnan(values)
    observed = values if not missing.any() else values[~missing]
    train_end = train_length(length, train_fraction)
    training = values[:train_end][~missing[:train_end]]
    # One look for infinities; the numbers below would only come out as NaN.
    has_infinite = bool(np.isinf(observed).any())
    measured = observed[:0] if has_infinite else observed
    spike_fraction, worst_spike = _NAN, _NAN
    if config.measures_spikes:
        spike_fraction, worst_spike = _spikes(measured, config.spike_size)
    is_finite = length > 0 and not has_infinite
    return Measurements(
        length=length,
        has_infinite=has_infinite,
        train_observed=len(training),
        train_is_constant=len(training) > 0 and bool(training.min() == training.max()),
        missing_fraction=1.0 - len(observed) / length if length else _NAN,
        longest_gap_fraction=_longest_run(missing) / length if length else _NAN,
        constant_fraction=_constant(values, config.constant_window),
        clipped_fraction=_clipped(measured) if config.measures_clipping else _NAN,
        spike_fraction=spike_fraction,
        worst_spike=worst_spike,
        adf=dickey_fuller(values) if config.measures_stationarity and is_finite else _NAN,
        forecastability=(
            forecastability(values) if config.measures_forecastability and is_finite else _NAN
        ),
    )


def forecastability(values: np.ndarray) -> float:
    """Say how far the spectrum of a series is from that of white noise, on average over windows.

    Per window of 256 points: 1 - H / log(bins) with the entropy H of the amplitudes of its real
    Fourier transform, the mean among them. A window in which nothing happens counts as 1. What is
    left at the end and shorter than a window is not looked at; a series that is itself shorter is
    one window.

    Args:
        values: float32, at least one point; a missing point counts as 0.

    Source: UTSD's `dataset_evaluation.py`, in float32 as there.
    """
    window = min(FORECASTABILITY_WINDOW, len(values))
    num_windows = len(values) // window
    windows = values[: num_windows * window].reshape(num_windows, window)
    num_bins = window // 2 + 1
    if num_bins == 1:
        return 1.0
    total = 0.0
    for start in range(0, num_windows, _WINDOWS_AT_ONCE):  # small enough for the processor's cache
        amplitudes = _amplitudes(windows[start : start + _WINDOWS_AT_ONCE])
        sums = amplitudes.sum(axis=1)
        logs = np.log(np.maximum(amplitudes, np.finfo(np.float32).tiny))
        is_flat = sums == 0.0
        sums[is_flat] = 1.0  # which makes their entropy 0
        entropies = np.log(sums) - (amplitudes * logs).sum(axis=1) / sums
        total += float((1.0 - entropies / math.log(num_bins)).sum(dtype=np.float64))
    return total / num_windows


def _amplitudes(windows: np.ndarray) -> np.ndarray:
    filled = np.nan_to_num(windows, nan=0.0)
    peak = float(np.abs(filled).max())
    if peak > _LARGEST_SQUARED or 0.0 < peak < 1.0 / _LARGEST_SQUARED:
        filled = filled / peak  # the squares below would not fit float32; only ratios count
    spectra = np.fft.rfft(filled, axis=1)
    return np.sqrt(spectra.real**2 + spectra.imag**2)


def _longest_run(flags: np.ndarray) -> int:
    starts, ends = _runs(flags)
    return int((ends - starts).max()) if len(starts) else 0


def _runs(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where runs of True begin, and where they have ended."""
    if not flags.any():
        return np.empty(0, np.int64), np.empty(0, np.int64)
    edges = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    edges = np.concatenate([[0] if flags[0] else [], edges, [len(flags)] if flags[-1] else []])
    return edges[::2].astype(np.int64), edges[1::2].astype(np.int64)


def _constant(values: np.ndarray, window: int) -> float:
    """Share of windows, one after the other, whose observed points are all equal.

    A window with fewer than two observed points is not counted: gaps are measured by themselves.
    What is left at the end and shorter than a window is not looked at, unless it is all there is.
    """
    window = min(window, len(values))
    if window < 2:
        return _NAN
    windows = values[: len(values) // window * window].reshape(-1, window)
    lowest, highest = np.fmin.reduce(windows, axis=1), np.fmax.reduce(windows, axis=1)
    is_constant = lowest == highest  # False where all are missing
    num_counted = len(windows)
    if np.isnan(values).any():
        counts = (~np.isnan(windows)).sum(axis=1) >= 2
        is_constant &= counts
        num_counted = int(counts.sum())
    return float(is_constant.sum()) / num_counted if num_counted else _NAN


def _clipped(observed: np.ndarray) -> float:
    """Share of points that look cut off: three or more in a row at the exact minimum or maximum.

    An end of the range is no sign of clipping, and not counted, where it is the natural value:

    - 0: it does not rain, the sun is down, nobody came;
    - where more than half of all points sit: an idle machine, unlimited visibility;
    - in a series of at most 16 different values: a state or a small count, not a measurement.

    Ours: no paper defines it.
    """
    if len(observed) == 0:
        return _NAN
    num_clipped = 0
    for extreme in {float(observed.min()), float(observed.max())} - {0.0}:
        sits = observed == np.float32(extreme)
        if 2 * int(sits.sum()) > len(observed):
            continue
        starts, ends = _runs(sits)
        lengths = ends - starts
        num_clipped += int(lengths[lengths >= _CLIPPED_RUN].sum())
    if num_clipped and len(np.unique(observed)) < _FEWEST_LEVELS:
        return 0.0
    return num_clipped / len(observed)


def _spikes(observed: np.ndarray, size: float) -> tuple[float, float]:
    """Measure points that jump away from both neighbours, to the same side.

    The height of such a point is the smaller of its two jumps, over the robust standard deviation
    of all steps: 1.4826 times their median distance from their median or, where that is zero as
    more than half of the steps are equal, 1.2533 times their mean distance. Gaps are passed over.

    Ours: no paper defines it.

    Returns:
        share of the points that are at least `size` high, and the greatest height.
    """
    if len(observed) < 3:
        return _NAN, _NAN
    if np.abs(observed).max() > _LARGEST_VALUE:
        observed = observed.astype(np.float64)  # the difference of two would not fit float32
    steps = np.diff(observed)
    distances = np.abs(steps - _median(steps))
    scale = _SCALE_OF_MEDIAN * _median(distances)
    if scale == 0.0:
        scale = _SCALE_OF_MEAN * float(distances.mean(dtype=np.float64))
    if scale == 0.0:
        return 0.0, 0.0
    jumps = np.abs(steps)
    heights = np.minimum(jumps[1:], jumps[:-1])
    heights[(steps[1:] > 0) == (steps[:-1] > 0)] = 0.0
    num_spikes = int((heights >= size * scale).sum())
    return num_spikes / len(observed), float(heights.max()) / scale


def _median(values: np.ndarray) -> float:
    """Return the lower median: several times as fast as `np.median`, which looks for NaN."""
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])
