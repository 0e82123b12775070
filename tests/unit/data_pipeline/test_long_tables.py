import datetime as dt
import itertools
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources import CsvSource, ParquetSource, long
from data_pipeline.table_batches import open_table_batches

DAY = dt.datetime(2020, 1, 1)


def csv(folder: Path, *lines: str, **options: object) -> CsvSource:
    path = folder / "sales.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CsvSource(path=str(path), **options)


def parquet(folder: Path, columns: dict, **options: object) -> ParquetSource:
    path = folder / "sales.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return ParquetSource(path=str(path), **options)


def values(source) -> dict[tuple[str, int], list[float]]:
    records = list(source.records())
    assert all(isinstance(record, SeriesRecord) for record in records), records
    return {(record.item_id, record.variate): record.values.tolist() for record in records}


ROWS = ("A,2020-01-01,1,5", "A,2020-01-02,2,6", "B,2020-01-01,3,7", "B,2020-01-03,4,")


def test_rows_below_one_another_are_series(tmp_path) -> None:
    records = list(csv(tmp_path, "unique_id,ds,y,z", *ROWS).records())
    names = [(record.item_id, record.variate) for record in records]
    assert names == [("A", 0), ("A", 1), ("B", 0), ("B", 1)]
    assert [record.values[0] for record in records] == [1, 5, 3, 7]
    assert np.isnan(records[3].values[-1])
    assert {record.source for record in records} == {"sales"}
    assert (records[0].start, records[0].end, records[0].freq) == (
        DAY,
        DAY + dt.timedelta(days=1),
        "D",
    )


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_order_of_rows_does_not_matter(tmp_path, order) -> None:
    expected = {("A", 0): [1.0, 2.0], ("B", 0): [3.0, 4.0]}
    rows = [ROWS[row] for row in order]
    source = csv(tmp_path, "unique_id,ds,y,z", *rows, columns=("y",), layout="long")
    assert values(source) == expected


def test_missing_rows_are_nan_on_the_grid_of_the_series(tmp_path) -> None:
    days = [1, 2, 3, 6]
    source = csv(tmp_path, "id,date,y", *[f"A,2020-01-{d:02d},{d}" for d in days], layout="long")
    (found,) = values(source).values()
    np.testing.assert_array_equal(found, [1, 2, 3, np.nan, np.nan, 6])


def test_parquet_is_read_over_batches_with_names_of_any_type(tmp_path) -> None:
    stamps = [DAY + dt.timedelta(hours=hour) for hour in range(5)]
    columns = {
        "store": np.repeat([7, 8], 5),
        "item": pa.array(["x"] * 10).dictionary_encode(),
        "when": stamps * 2,
        "y": np.arange(10, dtype=np.int64),
    }
    source = parquet(tmp_path, columns, id_columns=("store", "item"))
    assert values(source) == {("7/x", 0): [0, 1, 2, 3, 4], ("8/x", 0): [5, 6, 7, 8, 9]}
    assert next(source.records()).freq == "h"


def test_long_file_is_never_in_memory_whole(tmp_path) -> None:
    num_series, length = 64, 20_000
    hours = np.arange(length).astype("datetime64[h]").astype("datetime64[us]")
    columns = {
        "unique_id": np.repeat([f"s{i:03d}" for i in range(num_series)], length),
        "ds": np.tile(hours, num_series),
        "y": np.random.default_rng(0).normal(size=num_series * length),
    }
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table(columns), path)
    before = pa.total_allocated_bytes()
    peaks = []
    for record in ParquetSource(path=str(path)).records():
        peaks.append(pa.total_allocated_bytes() - before)
        assert len(record.values) == length
    assert len(peaks) == num_series
    assert max(peaks) < num_series * length * 16 / 2


@pytest.mark.parametrize(
    "lines",
    [
        ("unique_id,ds,y", "A,2020-01-01,1", "B,2020-01-01,2"),
        ("Item_ID,ds,y", "A,2020-01-01,1", "B,2020-01-01,2"),
        ("ds,entity,y", "2020-01-02,A,1", "2020-01-01,B,2"),
    ],
)
def test_long_tables_are_known_by_text_that_names_series_and_times_that_repeat(
    tmp_path, lines
) -> None:
    assert set(values(csv(tmp_path, *lines))) == {("A", 0), ("B", 0)}


def test_tables_without_such_names_or_times_are_wide(tmp_path) -> None:
    times_once = ("id,ds,y", "a,2020-01-01,1", "b,2020-01-02,2")
    assert set(values(csv(tmp_path, *times_once, columns=("y",)))) == {("sales_y", 0)}
    numbers = ("id,ds,y", "4,2020-01-01,1", "5,2020-01-02,2")
    assert set(values(csv(tmp_path, *numbers))) == {("sales_id", 0), ("sales_y", 1)}
    with pytest.raises(DataError, match="stands twice"):
        values(csv(tmp_path, "city,ds,y", "A,2020-01-01,1", "B,2020-01-01,2", columns=("y",)))


def test_one_series_longer_than_the_first_rows_is_long(tmp_path) -> None:
    minutes = np.arange(70_000).astype("datetime64[m]").astype("datetime64[us]")
    names = np.array(["A"] * 69_999 + ["B"])
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table({"id": names, "time": minutes, "y": np.ones(70_000)}), path)
    assert set(values(ParquetSource(path=str(path)))) == {("A", 0), ("B", 0)}


@pytest.mark.parametrize(
    ("rows", "reason", "says"),
    [
        (["B,2020-01-01,1", "B,2020-01-01,2"], "repeated_times", "01 00:00:00 stands twice"),
        (
            ["B,2020-01-01 00:00,1", "B,2020-01-01 01:00,2", "B,2020-01-01 02:00,3",
             "B,2020-01-01 02:17,4"],
            "irregular_times", "02:17:00 does not fall on the grid",
        ),
        (
            [f"B,2020-01-01 {h:02d}:00,1" for h in range(20)]
            + [f"B,2020-01-{d:02d} {h:02d}:00,1" for d in (2, 3) for h in range(0, 24, 4)],
            "irregular_times", "11 rows follow one another by 4:00:00",
        ),
        (
            [f"B,2021-03-28 {h:02d}:00,1" for h in range(24) if h != 2],
            "clock_change", "03:00:00 follows 2021-03-28 01:00:00",
        ),
    ],
)  # fmt: skip
def test_series_with_a_fault_in_its_times_is_dropped_alone(
    tmp_path, caplog, rows, reason, says
) -> None:
    lines = ("unique_id,ds,y", "A,2020-01-01 00:00,1", *rows, "C,2020-01-01 00:00,3")
    with caplog.at_level(logging.WARNING):
        found = list(csv(tmp_path, *lines).records())
    assert [item.item_id for item in found] == ["A", "B", "C"]
    assert found[1] == Drop(item_id="B", source="sales", reason=reason)
    (record,) = caplog.records
    assert "sales.csv, column 'ds', series 'B'" in record.getMessage()
    assert says in record.getMessage()


def test_local_times_are_read_in_their_zone(tmp_path) -> None:
    hours = [0, 1, 2, 2, 3]
    rows = [f"{name},2021-10-31 0{hour}:00,{i}" for name in "AB" for i, hour in enumerate(hours)]
    source = csv(tmp_path, "unique_id,ds,y", *rows, time_zone="Europe/Berlin")
    assert values(source) == {("A", 0): [0, 1, 2, 3, 4], ("B", 0): [0, 1, 2, 3, 4]}
    assert next(source.records()).start == dt.datetime(2021, 10, 30, 22)
    zoned = [row.replace(":00,", ":00Z,") for row in rows]
    with pytest.raises(ConfigError, match=r"time_zone: .*sales\.csv, column 'ds' has times with"):
        list(csv(tmp_path, "unique_id,ds,y", *zoned, time_zone="Europe/Berlin").records())


def test_day_comes_first_in_all_rows_if_it_does_in_one(tmp_path) -> None:
    first = [f"s{n},01/{month:02d}/2020,1" for n in range(20_000) for month in (1, 2, 3)]
    source = csv(tmp_path, "unique_id,ds,y", *first, "z,31/12/2020,1")  # behind the first batch
    assert not open_table_batches(tmp_path / "sales.csv").head_is_all
    record = next(source.records())
    assert (record.start, record.end, record.freq) == (DAY, dt.datetime(2020, 3, 1), "MS")


def test_names_are_text_as_they_stand(tmp_path) -> None:
    rows = [f"{name},2020-01-01,1" for name in ("007", "NA", "7", "Zürich")]
    source = csv(tmp_path, "id,ds,y", *rows, layout="long")
    assert [name for name, _ in values(source)] == ["007", "NA", "7", "Zürich"]


@pytest.mark.parametrize(
    ("lines", "options", "error", "says"),
    [
        (["unique_id,ds,y", "A,2020-01-01,1", "B,2020-01-01,q"], {}, DataError, r"row 2: 'q' is"),
        (["unique_id,ds,y", "A,2020-01-01,1", ",2020-01-01,2"], {}, DataError,
         r"column 'unique_id', row 2: the name of the series is empty"),
        (["unique_id,ds,y,state", "A,2020-01-01,1,CA", "B,2020-01-01,2,TX"], {}, DataError,
         r"column 'state', row 1: 'CA'.*id_columns"),
        (["unique_id,ds", "A,2020-01-01", "B,2020-01-01"], {}, DataError, "no column of values"),
        (["a,ds,y", "A,2020-01-01,1"], {"layout": "long"}, ConfigError, "id_columns: .*unique_id"),
        (["id,a,y", "A,1,1"], {"layout": "long"}, ConfigError, "time_column: no column"),
        (["id,ds,y", "A,2020-01-01,1"], {"id_columns": ("shop",)}, ConfigError, "no column 'shop'"),
        (["id,ds,y", "A,2020-01-01,1"], {"id_columns": ("id",), "columns": ("id",)}, ConfigError,
         "share a column"),
        (["id,ds,y", "A,2020-01-01 00:00Z,1", "B,2020-01-01 00:00,1"], {"layout": "long"},
         DataError, "row 2: '2020-01-01 00:00' is not a time"),
        (["id,ds,y", "A,2020-01-01,1", "A,,1"], {"layout": "long"}, DataError, "column 'ds'|#1"),
    ],
)  # fmt: skip
def test_faults_of_a_long_file_are_named(tmp_path, lines, options, error, says) -> None:
    with pytest.raises(error, match=says) as caught:
        list(csv(tmp_path, *lines, **options).records())
    assert "sales.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fault_far_behind_the_first_rows_has_its_row_number(tmp_path) -> None:
    rows = [f"s{n},2020-01-{day:02d},1" for n in range(4000) for day in range(1, 29)]
    for bad, says in (("s,2020-01-01,q", "row 112001.*'q'"), ("s,2020-13-01,1", "row 112001")):
        with pytest.raises(DataError, match=says):
            list(csv(tmp_path, "unique_id,ds,y", *rows, bad).records())


def test_mixed_rows_beyond_the_stated_memory_are_refused(tmp_path, monkeypatch) -> None:
    rows = [f"{name},2020-01-{day:02d},1" for day in range(1, 29) for name in "AB"]
    source = csv(tmp_path, "unique_id,ds,y", *rows)
    assert set(values(source)) == {("A", 0), ("B", 0)}
    monkeypatch.setattr(long, "SORT_BYTES", 1000)
    with pytest.raises(DataError, match=r"row 3: series 'A' goes on after .*1000; sort the file"):
        list(source.records())
