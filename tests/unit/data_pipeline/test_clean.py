import math
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.steps.clean import CleanConfig, reason_to_drop
from data_pipeline.steps.quality import Measurements, QualityConfig, measure

NAN = np.nan

SOUND = Measurements(
    length=1000,
    has_infinite=False,
    train_observed=900,
    train_is_constant=False,
    missing_fraction=0.0,
    longest_gap_fraction=0.0,
    constant_fraction=0.0,
    clipped_fraction=0.0,
    spike_fraction=0.0,
    worst_spike=1.0,
    adf=-5.0,
    forecastability=0.4,
)
EVERY_THRESHOLD = {
    "max_missing_fraction": 0.2,
    "max_gap_fraction": 0.05,
    "max_constant_fraction": 0.5,
    "max_clipped_fraction": 0.2,
    "max_spike_fraction": 0.25,
    "max_adf": -2.0,
    "min_forecastability": 0.1,
}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, 2, 3], "too_short"),
        ([], "too_short"),
        ([1, 2, np.inf, 4, 5], "infinite"),
        ([1, 2, -np.inf, 4, 5], "infinite"),
        ([NAN] * 5, "no_observation"),
        ([NAN, NAN, NAN, NAN, 5], "no_observation"),  # nothing to train on
        ([1, 2, NAN, NAN, NAN], "too_many_missing"),
        ([1, 2, NAN, NAN, 5], "gap_too_long"),
        ([3, 3, NAN, 3, 3], "constant"),
        ([3, 3, 3, 3, 9], "constant"),  # changes only after the training part
        ([1, 2, NAN, 4, NAN], None),
        ([1, 2, 3, 4, 5], None),
    ],
)
def test_each_fault_has_its_reason(values, reason) -> None:
    config = CleanConfig(min_length=4, max_missing_fraction=0.5, max_gap_fraction=0.3)
    values = np.array(values, np.float32)
    measurements = measure(values, train_fraction=0.8, config=QualityConfig())
    assert reason_to_drop(measurements, config) == reason


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        ({"missing_fraction": 0.21}, "too_many_missing"),
        ({"longest_gap_fraction": 0.051}, "gap_too_long"),
        ({"constant_fraction": 0.51}, "mostly_constant"),
        ({"clipped_fraction": 0.21}, "clipped"),
        ({"spike_fraction": 0.26}, "spiky"),
        ({"adf": -1.9}, "not_stationary"),
        ({"forecastability": 0.09}, "unpredictable"),
        # A series at the threshold stays, and so does one that could not be measured.
        ({"missing_fraction": 0.2, "longest_gap_fraction": 0.05, "constant_fraction": 0.5}, None),
        ({"clipped_fraction": 0.2, "spike_fraction": 0.25, "adf": -2.0}, None),
        ({"forecastability": 0.1}, None),
        ({"adf": NAN, "forecastability": NAN, "clipped_fraction": NAN}, None),
        # The first reason counts.
        ({"forecastability": 0.0, "clipped_fraction": 1.0}, "clipped"),
    ],
)
def test_each_threshold_drops_what_is_beyond_it(measured, reason) -> None:
    config = CleanConfig(**EVERY_THRESHOLD)
    assert reason_to_drop(replace(SOUND, **measured), config) == reason


def test_null_threshold_drops_nothing() -> None:
    off = {name: None for name in EVERY_THRESHOLD if name != "max_missing_fraction"}
    worst = replace(
        SOUND,
        longest_gap_fraction=1.0,
        constant_fraction=1.0,
        clipped_fraction=1.0,
        spike_fraction=1.0,
        adf=math.inf,
        forecastability=0.0,
    )
    assert reason_to_drop(worst, CleanConfig(**off)) is None


def test_trends_and_noise_stay_by_default() -> None:
    wanders = replace(SOUND, adf=3.0, forecastability=0.001)
    assert reason_to_drop(wanders, CleanConfig()) is None


def test_constant_series_can_be_kept() -> None:
    flat = replace(SOUND, train_is_constant=True)
    assert reason_to_drop(flat, CleanConfig()) == "constant"
    assert reason_to_drop(flat, CleanConfig(drops_constant=False)) is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_length": 0}, ["min_length", "0"]),
        ({"max_missing_fraction": 1.5}, ["max_missing_fraction", "1.5"]),
        ({"max_gap_fraction": -0.1}, ["max_gap_fraction", "-0.1"]),
        ({"min_forecastability": 2.0}, ["min_forecastability", "2.0"]),
    ],
)
def test_impossible_thresholds_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        CleanConfig(**settings)


@pytest.mark.parametrize(
    ("threshold", "measure_name"),
    [
        ("max_clipped_fraction", "measures_clipping"),
        ("max_spike_fraction", "measures_spikes"),
        ("max_adf", "measures_stationarity"),
        ("min_forecastability", "measures_forecastability"),
    ],
)
def test_threshold_of_what_is_not_measured_is_refused(threshold, measure_name) -> None:
    off = QualityConfig(**{measure_name: False})
    without = replace(CleanConfig(**EVERY_THRESHOLD), **{threshold: None})
    without.check_measured(off)
    with pytest.raises(ValueError, match=rf"clean\.{threshold} .* quality\.{measure_name}"):
        CleanConfig(**EVERY_THRESHOLD).check_measured(off)
