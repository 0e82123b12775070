import numpy as np
import pytest

from data_pipeline.clock import check_clock, check_step, to_utc
from data_pipeline.errors import DataError


def stamps(first: str, last: str, step: str = "1h", without: str | None = None) -> np.ndarray:
    """Return regular stamps, without those that begin with a text."""
    found = np.arange(
        np.datetime64(first, "us"),
        np.datetime64(last, "us"),
        np.timedelta64(int(step[:-1]), step[-1]).astype("timedelta64[us]"),
    )
    if without is None:
        return found
    return found[[without not in str(stamp) for stamp in found]]


@pytest.mark.parametrize("step", ["1h", "15m"])
@pytest.mark.parametrize(
    ("zone", "hour"),
    [
        ("Europe/Berlin", "2021-03-28T02"),
        ("Europe/London", "2021-03-28T01"),
        ("America/Chicago", "2021-03-14T02"),
        ("Australia/Melbourne", "2021-10-03T02"),
    ],
)
def test_hour_that_clocks_skip_is_refused_without_a_zone_and_read_with_it(zone, hour, step) -> None:
    day = np.datetime64(hour[:10])
    local = stamps(str(day - 2), str(day + 3), step, without=hour)
    row = int(np.argmax(np.diff(local))) + 2
    with pytest.raises(DataError, match=rf"here, row {row}: .*set forward.*time_zone"):
        check_clock(local, "here")
    assert len(np.unique(np.diff(to_utc(local, zone, "here")))) == 1


def test_complete_days_and_ordinary_gaps_are_no_change_of_clock() -> None:
    check_clock(stamps("2021-03-26", "2021-03-31"), "here")
    check_clock(stamps("2021-03-26", "2021-03-31", without="2021-03-27T02"), "here")
    check_clock(stamps("2020-01-01", "2022-01-01", "24h"), "here")
    # The hour is one of many gaps.
    many = stamps("2021-03-01", "2021-04-30", without="T02")
    check_clock(many, "here")


def test_repeated_hour_is_told_apart_by_the_order_of_rows() -> None:
    local = stamps("2021-10-31T00:00", "2021-10-31T05:00", "30m")
    again = np.concatenate([local[:6], local[4:]])  # 02:00 and 02:30 come twice
    utc = to_utc(again, "Europe/Berlin", "here")
    np.testing.assert_array_equal(utc, stamps("2021-10-30T22:00", "2021-10-31T04:00", "30m"))


def test_hour_that_came_twice_or_never_is_named() -> None:
    once = stamps("2021-10-31T00:00", "2021-10-31T05:00")
    with pytest.raises(DataError, match="here, row 3: 2021-10-31 02:00:00 came twice in Europe"):
        to_utc(once, "Europe/Berlin", "here")
    never = stamps("2021-03-28T00:00", "2021-03-28T05:00")
    with pytest.raises(DataError, match="here, row 3: there was no 2021-03-28 02:00:00 in Europe"):
        to_utc(never, "Europe/Berlin", "here")


def test_rows_that_keep_a_longer_step_are_another_step() -> None:
    places = np.concatenate([np.arange(20), np.arange(20, 60, 4)])
    times = np.datetime64("2020-01-01", "us") + places * np.timedelta64(3_600_000_000, "us")
    with pytest.raises(DataError, match="here, row 21: from 2020-01-01 20:00:00 on, 9 rows"):
        check_step(times, places, "here")
    check_step(times[:-3], places[:-3], "here")  # six of them may be gaps
    nights = np.concatenate([np.arange(9) + 24 * day for day in range(30)])
    check_step(times, nights, "here")
    check_step(times[:1], places[:1], "here")
