import math

import numpy as np
import pytest
from reference_series import reference_series

from data_pipeline.steps.quality import Measurements, QualityConfig, forecastability, measure

NAN = np.nan
GENERATOR = np.random.default_rng(7)
NOISE = GENERATOR.normal(size=1000).astype(np.float32)


def measured(values, **settings) -> Measurements:
    config = QualityConfig(**settings)
    return measure(np.asarray(values, np.float32), train_fraction=0.8, config=config)


def test_gaps_are_counted_and_the_longest_found() -> None:
    result = measured([NAN, 1, 2, NAN, NAN, NAN, 3, 4, NAN, NAN])
    assert (result.length, result.missing_fraction, result.longest_gap_fraction) == (10, 0.6, 0.3)
    assert measured([1, 2, NAN, NAN]).longest_gap_fraction == 0.5  # up to the end
    assert measured([1, 2, 3, 4]).longest_gap_fraction == 0.0
    assert measured([NAN] * 4).longest_gap_fraction == 1.0


def test_training_part_is_looked_at_by_itself() -> None:
    result = measured([3, 3, NAN, 3, 9])  # trains on the first four
    assert (result.train_observed, result.train_is_constant) == (3, True)
    result = measured([NAN, NAN, NAN, NAN, 9])
    assert (result.train_observed, result.train_is_constant) == (0, False)
    assert not measured([3, 4, 3, 3, 3]).train_is_constant


@pytest.mark.parametrize(
    ("values", "fraction"),
    [
        ([1, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3], 2 / 3),
        ([1, NAN, 1, 1, 1, NAN, 2, 1], 0.5),  # a gap changes nothing
        ([NAN, NAN, NAN, NAN, 1, 1, 1, 1, 1, 2, 1, 1], 0.5),  # a gap is no window
        ([NAN, NAN, NAN, 5, 1, 2, 3, 4], 0.0),  # nor is a single point
        ([1, 1, 1, 1, 7], 1.0),  # the rest is no window
        ([1, 1, 1], 1.0),  # unless it is all there is
        ([NAN] * 8, NAN),
        ([1], NAN),
    ],
)
def test_constant_windows_are_those_in_which_nothing_changes(values, fraction) -> None:
    result = measured(values, constant_window=4).constant_fraction
    assert result == pytest.approx(fraction, nan_ok=True)


def clipped_series(low: float, high: float) -> np.ndarray:
    return np.clip(np.sin(np.arange(1000) / 20) * 10 + 0.1 * NOISE, low, high)


def test_flat_tops_and_bottoms_are_clipped() -> None:
    values = clipped_series(-8, 6)
    expected = ((values == 6) | (values == -8)).mean()
    # Noise at the rim makes a few runs shorter than three.
    assert measured(values).clipped_fraction == pytest.approx(expected, abs=0.01)
    assert measured(values).clipped_fraction > 0.3
    assert measured(clipped_series(-99, 99)).clipped_fraction == 0.0


def test_natural_ends_of_a_range_are_not_clipped() -> None:
    rain = np.maximum(NOISE + 0.25, 0)
    assert 0.3 < (rain == 0).mean() < 0.5  # of the time it is dry
    assert measured(np.repeat(rain, 3)).clipped_fraction < 0.01
    drizzle = np.maximum(NOISE + 0.25, 0.01)
    assert measured(np.repeat(drizzle, 3)).clipped_fraction > 0.3
    idle = clipped_series(3, 99)
    assert (idle == 3).mean() > 0.5
    assert measured(idle).clipped_fraction == 0.0
    switch = np.repeat(NOISE > 0.5, 5) + 1.0
    assert measured(switch).clipped_fraction == 0.0
    # One level more than a state may have, and it is a measurement.
    levels = np.repeat(np.minimum(np.arange(340) % 20, 16), 1) + 1.0
    assert len(np.unique(levels)) == 17
    assert measured(levels).clipped_fraction == pytest.approx(4 / 20)
    assert measured(np.minimum(levels, 16)).clipped_fraction == 0.0


def test_clipping_needs_three_in_a_row() -> None:
    ramp = np.concatenate([np.arange(1, 30), [40, 40, 5, 40, 40, 6, 40, 40, 40]])
    assert measured(ramp).clipped_fraction == pytest.approx(3 / len(ramp))


def test_spikes_jump_out_and_back() -> None:
    values = np.cumsum(NOISE)
    before = measured(values)
    assert before.spike_fraction == 0.0
    assert before.worst_spike < 4
    values[[100, 300, 301, 500]] += 50
    result = measured(values)
    # 300 and 301 are a short level shift: neither jumps away from both of its neighbours.
    assert result.spike_fraction == pytest.approx(2 / 1000)
    assert 40 < result.worst_spike < 60
    values[600:] += 500
    values[800:] += 500
    values[801:] += 500  # two steps up in a row are no spike
    assert measured(values).worst_spike == pytest.approx(result.worst_spike, rel=0.05)


def test_height_of_a_spike_is_its_smaller_jump_in_robust_deviations() -> None:
    values = np.cumsum(NOISE)
    values[50] = values[49] + 40
    values[51] = values[49] - 20
    steps = np.diff(values.astype(np.float32))
    scale = 1.4826 * np.median(np.abs(steps - np.median(steps)))
    assert measured(values).worst_spike == pytest.approx(40 / scale, rel=0.01)
    # Where most steps are equal, the mean distance stands in for the median one.
    values = np.zeros(100)
    values[[50, 70]] = 30, 1
    assert measured(values).worst_spike == pytest.approx(30 / (1.2533 * 62 / 99), rel=1e-5)
    assert measured([1, 2, 3, 4, 5]).worst_spike == 0.0
    assert measured(np.ones(9)).worst_spike == 0.0
    assert math.isnan(measured([1, 2]).worst_spike)


def test_spike_over_a_gap_is_seen() -> None:
    values = np.cumsum(NOISE)
    values[100] += 50
    values[[99, 101]] = NAN
    assert measured(values).spike_fraction == pytest.approx(1 / 998)


# 1 - scipy.stats.entropy(|rfft|, base=bins) averaged over windows of 256, in float64, of the
# series of reference_series.py.
def test_forecastability_is_that_of_utsd() -> None:
    for kind, length, expected in (
        ("noise", 1000, 0.02726823264290105),
        ("walk", 8, 0.2880992989086161),
        ("walk", 1000, 0.2975618991345153),
        ("walk", 70000, 0.79642475032993),
        ("daily", 40, 0.3091595589002344),
        ("gaps", 1000, 0.3892784904443129),
        ("offset", 1000, 0.9991393927678326),
    ):
        # UTSD computes in float32, and so do we.
        assert forecastability(reference_series(kind, length)) == pytest.approx(expected, abs=2e-5)


def test_forecastability_of_extremes() -> None:
    line = np.sin(np.arange(512) * 2 * np.pi / 16).astype(np.float32)
    assert forecastability(line) > 0.99
    assert forecastability(NOISE) < 0.1
    assert forecastability(np.zeros(600, np.float32)) == 1.0
    assert forecastability(np.array([3.0], np.float32)) == 1.0
    half_dead = np.concatenate([NOISE[:256], np.zeros(256)]).astype(np.float32)
    assert forecastability(half_dead) == pytest.approx((1 + forecastability(NOISE[:256])) / 2)


def test_forecastability_does_not_look_at_the_rest() -> None:
    assert forecastability(NOISE[:600]) == forecastability(NOISE[:512])
    assert forecastability(NOISE[:255]) != forecastability(NOISE[:200])


@pytest.mark.parametrize("scale", [1e38, 1e-38])
def test_huge_and_tiny_values_are_measured_like_others(scale) -> None:
    values = np.cumsum(NOISE)
    values = (values / np.abs(values).max()).astype(np.float32)
    values[100] = 1.0
    expected, result = measured(values), measured(values * np.float32(scale))
    assert result.forecastability == pytest.approx(expected.forecastability, abs=1e-4)
    assert result.adf == pytest.approx(expected.adf, rel=1e-3)
    assert result.worst_spike == pytest.approx(expected.worst_spike, rel=1e-3)
    assert not result.has_infinite


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [NAN], [1.0], [NAN] * 300, [np.inf] * 300, [1, np.inf, 2]])
def test_odd_series_are_measured_without_a_warning(values) -> None:
    result = measured(values)
    assert result.length == len(values)
    assert result.has_infinite == bool(np.isinf(values).any())
    if result.has_infinite:
        assert math.isnan(result.adf)
        assert math.isnan(result.forecastability)
        assert math.isnan(result.worst_spike)


@pytest.mark.parametrize(
    ("switch", "names"),
    [
        ("measures_clipping", ["clipped_fraction"]),
        ("measures_spikes", ["spike_fraction", "worst_spike"]),
        ("measures_stationarity", ["adf"]),
        ("measures_forecastability", ["forecastability"]),
    ],
)
def test_what_is_not_measured_is_nan(switch, names) -> None:
    everything, less = measured(NOISE), measured(NOISE, **{switch: False})
    for name in Measurements.__dataclass_fields__:
        value = getattr(less, name)
        assert math.isnan(value) if name in names else value == getattr(everything, name)


@pytest.mark.parametrize("settings", [{"constant_window": 1}, {"spike_size": 0.0}])
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        QualityConfig(**settings)
