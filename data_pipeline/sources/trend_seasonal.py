"""Series made of a trend, seasons, noise, level shifts and spikes.

Ours: the peers that train on made-up series publish recipes of this kind (ForecastPFN,
arXiv 2311.01933; TimesFM, arXiv 2310.10688, appendix), each with other ranges. Here all parts add
up, where ForecastPFN multiplies trend and season, so that values may be of either sign; and every
part may be missing, so that a model also sees pure noise and pure trend.
"""

import numpy as np

_PERIODS = (4, 7, 12, 24, 30, 48, 52, 60, 96, 144, 168, 288, 336, 365, 672, 1440)
"""Steps of seasons as clocks and calendars make them."""
_MAX_SEASONS = 3
_MAX_HARMONICS = 4
_MAX_BENDS = 3
_MAX_SHIFTS = 3


def sample_trend_seasonal_series(generator: np.random.Generator, length: int) -> np.ndarray:
    """Draw one series of float64; every part is sized against a season of amplitude 1."""
    values_L = _trend(generator, length)
    for _ in range(int(generator.integers(_MAX_SEASONS + 1))):
        values_L += _season(generator, length)
    values_L += _level_shifts(generator, length)
    values_L += _noise(generator, length)
    values_L += _spikes(generator, length)
    scale, level = np.exp(generator.normal(0.0, 2.0)), generator.normal(0.0, 5.0)
    return scale * (values_L + level)


def _trend(generator: np.random.Generator, length: int) -> np.ndarray:
    """A line that bends at up to 3 times; its slopes are per length of the series."""
    num_bends = int(generator.integers(_MAX_BENDS + 1))
    bends = np.sort(generator.uniform(0.0, 1.0, num_bends))
    slopes = generator.normal(0.0, 2.0, num_bends + 1)
    times_L = np.linspace(0.0, 1.0, length)
    values_L = slopes[0] * times_L
    for bend, before, after in zip(bends, slopes[:-1], slopes[1:], strict=True):
        values_L += (after - before) * np.maximum(times_L - bend, 0.0)
    return values_L


def _season(generator: np.random.Generator, length: int) -> np.ndarray:
    """A period with up to 4 harmonics, whose amplitudes fall with their order."""
    # A season that is not seen at least twice is a trend.
    usual = [period for period in _PERIODS if 2 * period <= length] or [max(2, length // 2)]
    period = usual[int(generator.integers(len(usual)))]
    steps_L = np.arange(length)
    values_L = np.zeros(length)
    for order in range(1, int(generator.integers(1, _MAX_HARMONICS + 1)) + 1):
        amplitude = generator.normal() / order
        phase = generator.uniform(0.0, 2.0 * np.pi)
        values_L += amplitude * np.sin(2.0 * np.pi * order * steps_L / period + phase)
    return values_L


def _level_shifts(generator: np.random.Generator, length: int) -> np.ndarray:
    """Up to 3 lasting jumps, in one series of three."""
    values_L = np.zeros(length)
    if generator.random() < 1.0 / 3.0:
        for start in generator.integers(length, size=generator.integers(1, _MAX_SHIFTS + 1)):
            values_L[start:] += generator.normal(0.0, 2.0)
    return values_L


def _noise(generator: np.random.Generator, length: int) -> np.ndarray:
    """White noise, its size spread over two orders of magnitude."""
    return generator.normal(0.0, 10.0 ** generator.uniform(-2.0, 0.0), length)


def _spikes(generator: np.random.Generator, length: int) -> np.ndarray:
    """Single points that stand out, up to one in 100, in one series of three."""
    values_L = np.zeros(length)
    if generator.random() < 1.0 / 3.0:
        is_spike_L = generator.random(length) < generator.uniform(0.0, 0.01)
        values_L[is_spike_L] = generator.normal(0.0, 5.0, int(is_spike_L.sum()))
    return values_L
