import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline import table_file
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.table import Table, read_table
from data_pipeline.tiny import EVALUATION_TABLE

ReadCsv = Callable[..., Table]


@pytest.fixture
def read_csv(tmp_path: Path) -> ReadCsv:
    """Write lines to flow.csv and read it."""

    def read(*lines: str, **options: object) -> Table:
        path = tmp_path / "flow.csv"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return read_table(path, **options)

    return read


def stamps(table: Table, steps: int | None = None) -> list[str]:
    times = table.timestamps if steps is None else table.continued_timestamps(steps)
    return np.datetime_as_string(times, unit="m").tolist()


def days(first: str, count: int) -> list[str]:
    return [str(np.datetime64(first) + day) for day in range(count)]


def test_embedded_table_is_hourly_with_its_gaps() -> None:
    table = read_table(EVALUATION_TABLE)
    assert table.freq == "h"
    assert table.values_LC.shape == (8730, 7)
    assert table.values_LC.dtype == np.float32
    assert table.variates[0] == "temp"
    assert np.isnan(table.values_LC[:, 5]).sum() == 855
    assert stamps(table, 2) == ["2013-12-31T00:00", "2013-12-31T01:00"]


def test_missing_rows_and_empty_cells_become_nan(read_csv) -> None:
    table = read_csv("date,a,b", "2020-01-01,1,2", "2020-01-02,,3", "2020-01-05,4,5")
    assert table.freq == "D"
    assert stamps(table) == [f"2020-01-0{day}T00:00" for day in range(1, 6)]
    nan = np.nan
    expected = [[1, 2], [nan, 3], [nan, nan], [nan, nan], [4, 5]]
    np.testing.assert_array_equal(table.values_LC, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("dates", "freq", "following"),
    [
        (["2020-01-31", "2020-02-29", "2020-04-30"], "ME", ["2020-05-31", "2020-06-30"]),
        (["2020-01-01", "2020-02-01", "2020-03-01"], "MS", ["2020-04-01", "2020-05-01"]),
        (["2020-11-15", "2020-12-15", "2021-01-15"], "MS", ["2021-02-15", "2021-03-15"]),
        (["2020-01-01", "2020-04-01", "2020-10-01"], "QS-JAN", ["2021-01-01", "2021-04-01"]),
        (["2018-12-31", "2019-12-31", "2020-12-31"], "YE-DEC", ["2021-12-31", "2022-12-31"]),
        (["2020-01-06", "2020-01-13", "2020-01-27"], "W-MON", ["2020-02-03", "2020-02-10"]),
        (["2020-01-02", "2020-01-03", "2020-01-06", "2020-01-07", "2020-01-09"], "B",
         ["2020-01-10", "2020-01-13"]),
        (["2020-01-01 00:00", "2020-01-01 00:15", "2020-01-01 00:45", "2020-01-01 01:00"],
         "15min", ["2020-01-01T01:15", "2020-01-01T01:30"]),
        (["2020-02-27", "2020-02-28"], "D", ["2020-02-29", "2020-03-01"]),
    ],
)  # fmt: skip
def test_grid_follows_the_calendar(read_csv, dates, freq, following) -> None:
    table = read_csv("date,a", *[f"{date},{row}" for row, date in enumerate(dates)])
    assert table.freq == freq
    assert [
        stamp[: len(text)] for stamp, text in zip(stamps(table, 2), following, strict=True)
    ] == (following)
    observed = table.values_LC[~np.isnan(table.values_LC)]
    np.testing.assert_array_equal(observed, np.arange(len(dates)))


@pytest.mark.parametrize(
    ("header", "options"),
    [
        ("Date,a", {}),
        ("when,a", {}),
        ("when,a", {"time_column": "when"}),
    ],
)
def test_time_column_is_found_first_or_by_name(read_csv, header, options) -> None:
    table = read_csv(header, "2020-01-01,1", "2020-01-02,2", **options)
    assert table.variates == ("a",)
    assert table.freq == "D"


def test_time_column_may_stand_anywhere_under_its_usual_name(read_csv) -> None:
    table = read_csv("a,timestamp,time", "1,1600000000,5", "2,1600003600,6")
    assert table.variates == ("a", "time")  # epochs are times, small numbers called time are not
    assert stamps(table) == ["2020-09-13T12:26", "2020-09-13T13:26"]


def test_day_first_dates_and_zones_are_understood(read_csv) -> None:
    table = read_csv("date,a", "12/01/2020,1", "13/01/2020,2", "14/01/2020,3")
    assert stamps(table) == ["2020-01-12T00:00", "2020-01-13T00:00", "2020-01-14T00:00"]
    table = read_csv("date,a", "2020-01-01 00:00+02:00,1", "2020-01-01 01:00+02:00,2")
    assert stamps(table) == ["2019-12-31T22:00", "2019-12-31T23:00"]


def test_table_without_time_continues_by_row_number(read_csv) -> None:
    table = read_csv("a;b", "1;2", "3;4")
    assert table.timestamps is None
    assert table.freq is None
    assert table.continued_timestamps(2).tolist() == [2, 3]


def test_row_numbers_written_by_pandas_are_left_out(read_csv) -> None:
    assert read_csv(",a", "0,5", "1,7").variates == ("a",)


def test_columns_choose_and_order_the_variates(read_csv) -> None:
    lines = ("date,city,a,b", "2020-01-01,Rome,1,2", "2020-01-02,Rome,3,4")
    table = read_csv(*lines, columns=["b", "a"])
    assert table.variates == ("b", "a")
    np.testing.assert_array_equal(table.values_LC, [[2, 1], [4, 3]])


def test_numbers_may_turn_fractional_late_in_the_file(read_csv) -> None:
    rows = [f"{date},{1}" for date in days("1900-01-01", 120_000)]  # over 1 MiB: several blocks
    table = read_csv("date,a", *rows[:-1], rows[-1].rsplit(",", 1)[0] + ",1.5")
    assert table.values_LC[-1, 0] == 1.5


def test_time_can_be_ignored_where_stamps_have_faults(read_csv) -> None:
    lines = ("date,a", "2020-01-01,1", "2020-01-01,2", "2020-01-05,3")
    table = read_csv(*lines, ignores_time=True)
    assert table.timestamps is None
    assert table.variates == ("a",)
    np.testing.assert_array_equal(table.values_LC, [[1], [2], [3]])


def test_single_row_has_no_step_to_continue(read_csv) -> None:
    with pytest.raises(DataError, match="one row has no time step"):
        read_csv("date,a", "2020-01-01,1").continued_timestamps(1)


HOURS = [f"2020-01-01 {hour:02d}:00,{hour}" for hour in range(5)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["date,a", "2020-01-01,1", "2020-01-02,n/k"], ["column 'a'", "row 2", "'n/k'"]),
        (["city,a", "Rome,1"], ["column 'city'", "row 1", "'Rome'", "numeric ones are a"]),
        (
            ["date,a", "2020-01-01,1", "2020-01-02,1", "2020-01-02,3"],
            ["column 'date'", "2020-01-02 00:00:00", "rows 2 and 3"],
        ),
        (
            ["date,a", "2020-01-01,1", "2020-01-03,1", "2020-01-02,3"],
            ["row 3 (2020-01-02", "row 2 (2020-01-03", "sort"],
        ),
        (["date,a", "2020-01-01,1", "2020-01-02,inf"], ["column 'a'", "row 2", "inf"]),
        (["date,a", "2020-01-01,1e39", "2020-01-02,1"], ["column 'a'", "row 1", "1e+39"]),
        (["date", "2020-01-01"], ["no numeric column", "date"]),
        (["date,a"], ["empty", "no rows"]),
        (["date,a", *HOURS, "2020-01-01 04:30,9"], ["row 6", "04:30", "1:00:00", "resample"]),
        (
            ["date,a", *HOURS, "2020-03-01 00:00,9"],
            ["6 rows", "1441 steps of 1:00:00", "row 5 (2020-01-01 04:00:00)"],
        ),
        (["date,a", "2020-01-01,1", ",2"], ["column 'date'", "row 2", "empty"]),
        (["date,a", "2020-01-01,1", "soon,2"], ["column 'date'", "row 2", "'soon'"]),
        (["date,a", "2020-01-01,1", "2020-01-02,2,3"], ["Expected 2 columns, got 3"]),
        (["a,a", "1,2"], ["column 'a' stands twice"]),
    ],
)
def test_faults_of_a_csv_are_named_in_one_line(read_csv, tmp_path, lines, words) -> None:
    with pytest.raises(DataError) as caught:
        read_csv(*lines)
    message = str(caught.value)
    assert str(tmp_path / "flow.csv") in message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": ["c"]}, ["columns", "'c'", "columns there: date, a"]),
        ({"time_column": "when"}, ["time_column", "'when'", "columns there: date, a"]),
        ({"columns": []}, ["columns", "empty"]),
        ({"columns": ["a", "a"]}, ["columns", "twice"]),
        ({"columns": ["date"], "time_column": "date"}, ["'date' is the time column"]),
    ],
)
def test_bad_options_list_the_columns(read_csv, options, words) -> None:
    with pytest.raises(ConfigError) as caught:
        read_csv("date,a", "2020-01-01,1", **options)
    for word in words:
        assert word in str(caught.value)


def test_column_chosen_as_time_must_hold_times(read_csv) -> None:
    with pytest.raises(DataError, match="'a': int64 values such as 1 are not times"):
        read_csv("a,b", "1,2", time_column="a")


def test_files_that_cannot_be_read_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_table(tmp_path)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"empty\.csv: the file is empty"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "bad.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        read_table(tmp_path / "bad.parquet")


def test_parquet_types_are_understood(tmp_path) -> None:
    columns = {
        "a": pa.array([1, None, 3], pa.int32()),
        "b": pa.array([True, False, None]),
        "c": pa.array([0.5, 1.5, float("nan")], pa.float64()),
        "at": pa.array([0, 3_600_000, 7_200_000], pa.timestamp("ms", tz="Europe/Rome")),
    }
    pq.write_table(pa.table(columns), tmp_path / "mixed.parquet")
    table = read_table(tmp_path / "mixed.parquet")
    assert table.variates == ("a", "b", "c")
    assert stamps(table) == ["1970-01-01T00:00", "1970-01-01T01:00", "1970-01-01T02:00"]
    nan = np.nan
    expected = np.array([[1, 1, 0.5], [nan, 0, 1.5], [3, nan, nan]], np.float32)
    np.testing.assert_array_equal(table.values_LC, expected)


def test_times_in_words_are_understood_and_none_without_a_year(read_csv, tmp_path) -> None:
    table = read_csv("date,a", "1 Jan 2020,1", "2 Jan 2020,2", "4 Jan 2020,3")
    assert stamps(table)[::3] == ["2020-01-01T00:00", "2020-01-04T00:00"]
    with pytest.raises(DataError, match=r"column 'time': '1 Jan' is not a time with a year"):
        read_csv("time,a", "1 Jan,1", "2 Jan,2")
    path = tmp_path / "clock.parquet"
    pq.write_table(pa.table({"time": ["10:30", "10:31"], "a": [1.0, 2.0]}), path)
    with pytest.raises(DataError, match=r"column 'time': '10:30' is not a time with a year"):
        read_table(path)


def test_zones_are_not_mixed(read_csv) -> None:
    with pytest.raises(DataError, match=r"row 2: '2020-01-01 01:00' is not a time"):
        read_csv("date,a", "2020-01-01 00:00+01:00,1", "2020-01-01 01:00,2")
    # Of these, pandas guesses no format that would tell them apart.
    with pytest.raises(DataError, match=r"row 2: '2020-01-01 02:00 PM\+01:00' is not a time"):
        read_csv("date,a", "2020-01-01 01:00 PM,1", "2020-01-01 02:00 PM+01:00,2")


def test_local_times_are_read_in_their_zone(read_csv) -> None:
    lines = ("date,a", "2021-03-28 01:00,1", "2021-03-28 03:00,2", "2021-03-28 04:00,3")
    assert np.isnan(read_csv(*lines).values_LC).sum() == 1
    table = read_csv(*lines, time_zone="Europe/Berlin")
    assert stamps(table) == ["2021-03-28T00:00", "2021-03-28T01:00", "2021-03-28T02:00"]
    with pytest.raises(ConfigError, match=r"time_zone: .*'date' has times with a zone"):
        read_csv("date,a", "2021-03-28 01:00Z,1", time_zone="Europe/Berlin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("when,température\n1,2\n".encode("latin-1"), ["header is not UTF-8", "column 2"]),
        ("a,b\n1,2\n".encode("utf-16"), ["header is not UTF-8", "column 1"]),
        ("a,b\n1,Köln\n".encode("latin-1"), ["column 'b', row 1", r"b'K\xf6ln' is not UTF-8"]),
        (b"a,b\n1,2\n3\n", ["Expected 2 columns, got 1"]),
        (b"," * 200_000, ["200001 columns or more", "at most 100000", "turn it round"]),
        (b"a" * (9 * 2**20), ["header is longer than"]),
    ],
)
def test_what_is_no_csv_is_told(tmp_path, content, words) -> None:
    (tmp_path / "flow.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "flow.csv")
    for word in (str(tmp_path / "flow.csv"), *words):
        assert word in str(caught.value)


def test_ten_million_columns_are_refused_without_reading_them(tmp_path) -> None:
    (tmp_path / "flow.csv").write_bytes(b"variate," * 10_000_000 + b"last\n1\n")  # 80 MB
    tracemalloc.start()
    try:
        before = pa.total_allocated_bytes()
        with pytest.raises(DataError, match="columns or more, at most 100000"):
            read_table(tmp_path / "flow.csv")
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()
    assert peak < 40 * 2**20


def test_parquet_with_too_many_columns_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(table_file, "MAX_COLUMNS", 3)
    pq.write_table(pa.table({name: [1.0] for name in "abcd"}), tmp_path / "wide.parquet")
    with pytest.raises(DataError, match=r"wide\.parquet: 4 columns or more, at most 3"):
        read_table(tmp_path / "wide.parquet")


def test_rows_longer_than_a_block_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(table_file, "_BLOCK_BYTES", 64)
    names = ",".join("abcdefghijklmnopqrst")
    row = ",".join(["0.1234567890123456"] * 20)
    (tmp_path / "flow.csv").write_text("\n".join([names, row, row, row]) + "\n")
    assert read_table(tmp_path / "flow.csv").values_LC.shape == (3, 20)
