import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.curation.table import (
    MEASURES,
    SCHEMA,
    THUMBNAILS,
    Removal,
    SeriesTable,
    merge_tables,
    read_batches,
    thumbnail,
)
from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.steps.quality import QualityConfig, measure

NAN = np.nan


@pytest.fixture
def write_table(tmp_path, make_record):
    """Write a table of a few points per series: (item_id, source, reason) each."""

    def write(name, rows):
        path = tmp_path / name
        with SeriesTable(path) as table:
            for item_id, source, reason in rows:
                record = make_record(np.arange(40), item_id=item_id, source=source)
                measurements = measure(record.values, train_fraction=0.9, config=QualityConfig())
                table.add(record, measurements, reason)
        return path

    return write


def rows_of(path) -> list[dict]:
    return [row for batch in read_batches(path) for row in batch.to_pylist()]


def test_row_holds_what_was_measured(tmp_path, make_record) -> None:
    record = make_record([1, NAN, 3, 5, 2, 8, 1, 1, 1, 2], domain="Web", freq=None)
    measurements = measure(record.values, train_fraction=0.9, config=QualityConfig())
    with SeriesTable(tmp_path / "t.parquet") as table:
        table.add(record, measurements, "spiky")
        table.add_drop(Drop(item_id="b", source="mill", reason="not_numeric"))
    first, second = rows_of(tmp_path / "t.parquet")
    assert (first["item_id"], first["source"], first["domain"]) == ("a", "plant", "Web")
    assert (first["freq"], first["length"], first["reason"]) == (None, 10, "spiky")
    for name in MEASURES:
        expected = getattr(measurements, name)
        assert first[name] == pytest.approx(None if np.isnan(expected) else expected, rel=1e-6)
    np.testing.assert_array_equal(first["thumbnail"], record.values)
    assert {name for name, value in second.items() if value is not None} == {
        "item_id",
        "source",
        "reason",
    }


def test_what_was_not_measured_is_null(tmp_path, make_record) -> None:
    record = make_record(np.arange(40))
    off = QualityConfig(measures_stationarity=False, measures_clipping=False)
    with SeriesTable(tmp_path / "t.parquet") as table:
        table.add(record, measure(record.values, train_fraction=0.9, config=off), None)
    (row,) = rows_of(tmp_path / "t.parquet")
    assert (row["adf"], row["clipped_fraction"], row["reason"]) == (None, None, None)
    assert row["spike_fraction"] == 0.0


def test_first_few_of_each_source_and_reason_have_a_thumbnail(write_table) -> None:
    rows = [(f"{s}{r}{i}", s, r) for i in range(5) for s in "ab" for r in (None, "spiky")]
    found = rows_of(write_table("t.parquet", rows))
    pictured = [row["item_id"] for row in found if row["thumbnail"] is not None]
    assert pictured == [item_id for item_id, *_ in rows if int(item_id[-1]) < THUMBNAILS]


def test_merged_table_is_all_tables_in_order(write_table, tmp_path) -> None:
    tables = [
        write_table(f"{number}.parquet", [(f"{number}.{i}", "a", None) for i in range(count)])
        for number, count in enumerate((3, 0, 2, 4))
    ]
    merge_tables(tables, {}, tmp_path / "all.parquet")
    merged = rows_of(tmp_path / "all.parquet")
    assert [row["item_id"] for row in merged] == [
        *("0.0", "0.1", "0.2"),
        *("2.0", "2.1"),
        *("3.0", "3.1", "3.2", "3.3"),
    ]
    assert [row["thumbnail"] is not None for row in merged] == [True] * 3 + [False] * 6
    assert pq.ParquetFile(tmp_path / "all.parquet").num_row_groups == 1


def test_removals_count_among_the_kept_series_of_a_block(write_table, tmp_path) -> None:
    rows = [("a", "s", "spiky"), ("b", "s", None), ("c", "s", "spiky"), ("d", "s", None)]
    tables = [write_table("0.parquet", rows), write_table("1.parquet", rows)]
    removals = {1: {1: Removal(reason="duplicate", copy_of="b")}, 0: {0: Removal(reason="x")}}
    merge_tables(tables, removals, tmp_path / "all.parquet")
    merged = rows_of(tmp_path / "all.parquet")
    assert [row["reason"] for row in merged] == [
        *("spiky", "x", "spiky", None),
        *("spiky", None, "spiky", "duplicate"),
    ]
    assert [row["copy_of"] for row in merged] == [None] * 7 + ["b"]
    assert merged[7]["thumbnail"] is not None  # the first of its reason


def test_removal_counts_over_batches(write_table, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.curation.table._ROWS_AT_ONCE", 2)
    rows = [(f"s{i}", "s", "spiky" if i % 3 == 0 else None) for i in range(11)]
    removals = {0: {number: Removal(reason="duplicate") for number in (0, 3, 6)}}
    merge_tables([write_table("t.parquet", rows)], removals, tmp_path / "all.parquet")
    merged = rows_of(tmp_path / "all.parquet")
    removed = [row["item_id"] for row in merged if row["reason"] == "duplicate"]
    assert removed == ["s1", "s5", "s10"]  # kept: 1 2 4 5 7 8 10


def test_removal_of_a_series_that_does_not_exist_is_refused(write_table, tmp_path) -> None:
    table = write_table("t.parquet", [("a", "s", None), ("b", "s", "spiky")])
    with pytest.raises(ValueError, match="1 kept series, but number 1"):
        merge_tables([table], {0: {1: Removal(reason="x")}}, tmp_path / "all.parquet")


def test_memory_does_not_grow_with_rows(tmp_path, make_record) -> None:
    record = make_record(np.arange(40))
    measurements = measure(record.values, train_fraction=0.9, config=QualityConfig())
    peaks = []
    for count in (8_000, 24_000):
        tracemalloc.start()
        with SeriesTable(tmp_path / "t.parquet") as table:
            for _ in range(count):
                table.add(record, measurements, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pq.ParquetFile(tmp_path / "t.parquet").metadata.num_rows == count
    assert peaks[1] < 1.2 * peaks[0]


def test_thumbnail_keeps_the_extremes_in_order() -> None:
    values = np.sin(np.arange(100_000) / 3000).astype(np.float32)
    values[12_345] = 50
    values[77_777] = -50
    small = thumbnail(values)
    assert small.dtype == np.float32
    assert len(small) == 256
    assert (small.max(), small.min()) == (50, -50)
    assert small.argmax() < small.argmin()
    ramp = thumbnail(np.arange(1000, dtype=np.float32))
    assert (np.diff(ramp) > 0).all()
    assert (ramp[0], ramp[-1]) == (0, 999)
    np.testing.assert_array_equal(thumbnail(-np.arange(1000, dtype=np.float32)), -ramp)


def test_thumbnail_shows_gaps() -> None:
    values = np.ones(1000, np.float32)
    values[:500] = NAN
    small = thumbnail(values)
    np.testing.assert_array_equal(np.isnan(small), np.arange(256) < 128)
    short = np.array([1, NAN, 3], np.float32)
    np.testing.assert_array_equal(thumbnail(short), short)


def test_file_that_is_no_table_is_refused(tmp_path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match=r"t\.parquet"):
        list(read_batches(path))
    path.write_bytes(b"PAR1 but not much else")
    with pytest.raises(DataError, match=r"t\.parquet.*cannot be read"):
        list(read_batches(path))
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="no table of series"):
        list(read_batches(path))
    table = pa.table({field.name: pa.array([], field.type) for field in SCHEMA}, schema=SCHEMA)
    pq.write_table(table, path)
    assert rows_of(path) == []
