import datetime as dt

import numpy as np
import pandas as pd
import pytest

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.steps.resample import ResampleConfig, resample

NAN = np.nan
TUESDAY = dt.datetime(2013, 3, 5)


def resampled(record: SeriesRecord, **settings) -> SeriesRecord:
    result = resample(record, ResampleConfig(**settings))
    assert isinstance(result, SeriesRecord)
    return result


@pytest.mark.parametrize(
    ("source_freq", "target", "length"),
    [
        ("15min", "h", 1000),
        ("7min", "h", 1000),
        ("5min", "7h", 3000),
        ("h", "D", 1000),
        ("D", "3D", 100),
        ("D", "W", 300),
        ("D", "W-WED", 300),
        ("W-SUN", "ME", 100),
        ("B", "ME", 600),
        ("h", "MS", 5000),
        ("MS", "QS-FEB", 60),
        ("D", "QE-NOV", 900),
        ("h", "YE", 20000),
        ("QE", "YS", 40),
    ],
)
@pytest.mark.parametrize("aggregate", ["mean", "max", "last"])
def test_bins_and_stamps_are_those_of_pandas(
    make_record, source_freq, target, length, aggregate
) -> None:
    start = dt.datetime(2013, 3, 5, 7, 10) if source_freq.endswith("min") else TUESDAY
    stamps = pd.date_range(start, periods=length, freq=source_freq)
    values = np.sin(np.arange(length)).astype(np.float32)
    values[::7] = NAN
    expected = pd.Series(values, index=stamps).resample(target).agg(aggregate)
    record = make_record(values, start=stamps[0].to_pydatetime(), freq=source_freq)
    result = resampled(record, freq=target, aggregate=aggregate, min_observed_fraction=1e-9)
    np.testing.assert_allclose(result.values, expected.to_numpy(), atol=1e-6)
    assert (result.start, result.end) == (expected.index[0], expected.index[-1])
    assert result.freq == target
    assert result.values.dtype == np.float32


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        ("mean", [2.5, 6.5]),
        ("sum", [10, 26]),
        ("min", [1, 5]),
        ("max", [4, 8]),
        ("first", [1, 5]),
        ("last", [4, 8]),
    ],
)
def test_each_aggregate(make_record, aggregate, expected) -> None:
    record = make_record(np.arange(1, 9), start=TUESDAY, freq="15min")
    assert resampled(record, freq="h", aggregate=aggregate).values.tolist() == expected


def test_bin_with_too_little_in_it_is_missing(make_record) -> None:
    values = [1, 1, 1, NAN, 2, 2, NAN, NAN, 3, 3, 3, 3]
    record = make_record(values, start=TUESDAY, freq="15min")
    np.testing.assert_array_equal(resampled(record, freq="h").values, [1, NAN, 3])
    half = resampled(record, freq="h", min_observed_fraction=0.5)
    np.testing.assert_array_equal(half.values, [1, 2, 3])
    total = resampled(record, freq="h", aggregate="sum")
    np.testing.assert_array_equal(total.values, [NAN, NAN, 12])


def test_first_and_last_bin_miss_what_lies_outside_of_the_series(make_record) -> None:
    start = dt.datetime(2013, 3, 5, 0, 30)
    record = make_record(np.ones(9), start=start, freq="15min")  # to 02:30
    np.testing.assert_array_equal(resampled(record, freq="h").values, [NAN, 1, 1])  # 2, 4, 3 of 4
    np.testing.assert_array_equal(
        resampled(record, freq="h", aggregate="sum").values, [NAN, 4, NAN]
    )
    # Calendar steps as well: March has 21 business days, of which 19 from the 5th on.
    record = make_record(np.ones(19 + 22 + 5), start=TUESDAY, freq="B")
    result = resampled(record, freq="ME", aggregate="sum")
    np.testing.assert_array_equal(result.values, [NAN, 22, NAN])
    np.testing.assert_array_equal(resampled(record, freq="ME").values, [1, 1, NAN])


def test_whole_days_do_not_depend_on_the_hour_of_the_start(make_record) -> None:
    record = make_record(np.ones(30), start=dt.datetime(2013, 3, 5, 23), freq="h")
    result = resampled(record, freq="D", aggregate="sum")
    np.testing.assert_array_equal(result.values, [NAN, 24, NAN])
    assert result.start == TUESDAY


def test_series_that_is_not_finer_stays_as_it_is(make_record) -> None:
    for freq in ("h", "D", "ME", "YS"):
        record = make_record([1, 2, 3], start=TUESDAY, freq=freq)
        assert resample(record, ResampleConfig(freq="h")) is record
    month = make_record([1, 2, 3], start=TUESDAY, freq="ME")
    assert resample(month, ResampleConfig(freq="MS")) is month


def test_other_sources_stay_as_they_are(make_record) -> None:
    config = ResampleConfig(freq="D", sources=("plant",))
    plant, mill = (
        make_record(np.ones(48), start=TUESDAY, source=name) for name in ("plant", "mill")
    )
    assert resample(mill, config) is mill
    assert len(resampled(plant, freq="D", sources=("plant",)).values) == 2


def test_without_a_start_bins_begin_where_the_series_does(make_record) -> None:
    record = make_record([1, 1, 2, 2, 3], freq="30min")
    result = resampled(record, freq="h", min_observed_fraction=0.5)
    assert (result.start, result.end, result.freq) == (None, None, "h")
    assert result.values.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(resampled(record, freq="h").values, [1, 2, NAN])


@pytest.mark.parametrize(
    ("freq", "start", "target", "reason"),
    [
        (None, TUESDAY, "h", "no_freq"),
        ("360Hz", TUESDAY, "h", "no_freq"),
        ("D", None, "ME", "no_start"),
        ("7min", None, "h", "no_start"),  # no whole number of steps fills an hour
    ],
)
def test_what_cannot_be_resampled_stays_or_is_dropped(
    make_record, freq, start, target, reason
) -> None:
    record = make_record(np.ones(100), freq=freq, start=start)
    assert resample(record, ResampleConfig(freq=target)) is record
    dropped = resample(record, ResampleConfig(freq=target, drops_without_freq=True))
    assert dropped == Drop(item_id="a", source="plant", reason=reason)


def test_series_without_points_or_observations_is_no_trouble(make_record) -> None:
    empty = make_record([], start=TUESDAY)
    assert resample(empty, ResampleConfig(freq="D")) is empty
    blank = make_record([NAN] * 48, start=TUESDAY)
    np.testing.assert_array_equal(resampled(blank, freq="D").values, [NAN, NAN])


def test_all_else_of_the_record_is_kept(make_record) -> None:
    record = make_record(np.ones(48), start=TUESDAY, item_id="x", domain="Web", variate=3)
    result = resampled(record, freq="D")
    assert (result.item_id, result.domain, result.variate) == ("x", "Web", 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freq": "fortnight"}, ["freq", "fortnight", "'10min'"]),
        ({"freq": "2ME"}, ["freq", "2ME"]),
        ({"freq": "B"}, ["freq", "B"]),
        ({"freq": "-1h"}, ["freq", "-1h"]),
        ({"freq": "h", "min_observed_fraction": 0.0}, ["min_observed_fraction", "0.0"]),
        (
            {"freq": "h", "aggregate": "sum", "min_observed_fraction": 0.5},
            ["min_observed_fraction is 0.5", "aggregate"],
        ),
    ],
)
def test_impossible_settings_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=".*".join(words)):
        ResampleConfig(**settings)
