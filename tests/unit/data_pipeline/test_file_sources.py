import datetime as dt
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop
from data_pipeline.sources import CsvSource, ParquetSource, row_files
from data_pipeline.sources.rows import RowReader
from data_pipeline.table import read_table


@pytest.fixture
def series_file(tmp_path):
    path = tmp_path / "many.parquet"
    rows = {
        "item_id": [f"s{index}" for index in range(300)],
        "target": [np.arange(index + 1, dtype=np.float32) for index in range(300)],
    }
    pq.write_table(pa.table(rows), path, row_group_size=100)
    return path


@pytest.fixture
def wide_file(tmp_path):
    path = tmp_path / "wide.parquet"
    stamps = np.arange("2020-01-01T00", "2020-01-01T05", dtype="datetime64[h]")
    columns = {"date": stamps.astype("datetime64[us]"), "a": np.arange(5.0), "target": np.ones(5)}
    pq.write_table(pa.table(columns), path)
    return path


def test_series_are_read_over_batches_and_row_groups(series_file) -> None:
    records = list(ParquetSource(path=str(series_file)).records())
    assert [record.item_id for record in records] == [f"s{index}" for index in range(300)]
    assert all(len(record.values) == index + 1 for index, record in enumerate(records))
    assert {record.source for record in records} == {"many"}


def test_series_file_is_never_decoded_whole(tmp_path) -> None:
    path = tmp_path / "one_group.parquet"
    values = np.random.default_rng(0).normal(size=(1024, 4096)).astype(np.float32)
    pq.write_table(pa.table({"target": list(values)}), path)  # 16 MiB in one row group
    before = pa.total_allocated_bytes()
    peaks = [pa.total_allocated_bytes() - before for _ in ParquetSource(path=str(path)).records()]
    assert max(peaks) < values.nbytes / 2


def test_auto_tells_lists_from_a_variate_called_target(series_file, wide_file) -> None:
    wide = list(ParquetSource(path=str(wide_file)).records())
    assert [(record.item_id, record.variate) for record in wide] == [
        ("wide_a", 0),
        ("wide_target", 1),
    ]
    assert wide[0].freq == "h"
    assert (wide[0].start.hour, wide[0].end.hour) == (0, 4)
    with pytest.raises(ConfigError, match=r"columns are for wide files.*many\.parquet"):
        list(ParquetSource(path=str(series_file), columns=("a",)).records())


def test_pattern_reads_all_matches_in_order(tmp_path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.csv").write_text("x\n1\n2\n")
    records = list(CsvSource(path=str(tmp_path / "*.csv"), domain="IoT").records())
    assert [(record.item_id, record.source, record.domain) for record in records] == [
        ("a_x", "a", "IoT"),
        ("b_x", "b", "IoT"),
    ]


def test_pattern_without_match_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no file matches .*none\*\.csv"):
        CsvSource(path=str(tmp_path / "none*.csv")).files()


def test_file_that_is_no_parquet_is_named(tmp_path) -> None:
    (tmp_path / "bad.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"bad\.parquet: cannot be read as Parquet"):
        list(ParquetSource(path=str(tmp_path / "bad.parquet")).records())


def unnamed_file(tmp_path):
    path = tmp_path / "unnamed.parquet"
    rows = {"target": [[float(index)] * 50 for index in range(100)], "feat": [[0.0] * 500] * 100}
    pq.write_table(pa.table(rows), path, row_group_size=10, use_dictionary=False)
    return path


def test_units_are_groups_of_row_groups_and_names_do_not_depend_on_them(
    tmp_path, monkeypatch
) -> None:
    source = ParquetSource(path=str(unnamed_file(tmp_path)))
    whole = [(record.item_id, record.values.tolist()) for record in source.records()]
    assert [name for name, _ in whole] == [f"unnamed_{row}" for row in range(100)]
    (unit,) = source.units()
    assert unit.size_bytes == pytest.approx(100 * (50 + 500) * 8, rel=0.2)  # covariates as well
    monkeypatch.setattr(row_files, "UNIT_BYTES", 3 * unit.size_bytes // 10)
    units = source.units()
    assert [unit.part for unit in units] == [0, 1, 2, 3]
    assert sum(part.size_bytes for part in units) == unit.size_bytes
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    assert [len(part) for part in parts] == [30, 30, 30, 10]
    assert [(r.item_id, r.values.tolist()) for part in parts for r in part] == whole


def test_covariates_are_not_decoded(tmp_path, monkeypatch) -> None:
    seen = []
    read = RowReader.read

    def noted(self, batch):
        seen.append(batch.schema.names)
        return read(self, batch)

    monkeypatch.setattr(RowReader, "read", noted)
    list(ParquetSource(path=str(unnamed_file(tmp_path))).records())
    assert seen[0] == ["target"]


def test_damaged_page_is_told_by_its_checksum(tmp_path) -> None:
    path = tmp_path / "sums.parquet"
    values = np.random.default_rng(0).normal(size=2000).astype(np.float32)
    pq.write_table(
        pa.table({"target": [values]}),
        path,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    content[content.index(values[1000:1010].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"sums\.parquet: cannot be read as Parquet .*CRC"):
        list(ParquetSource(path=str(path)).records())


def test_rows_that_the_footer_promises_must_be_there(series_file, monkeypatch) -> None:
    iter_batches = pq.ParquetFile.iter_batches

    def cut_short(self, *args, **options):
        yield next(iter_batches(self, *args, **options))

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", cut_short)
    with pytest.raises(DataError, match=r"many\.parquet: has 236 rows fewer than its footer says"):
        list(ParquetSource(path=str(series_file)).records())


def test_name_that_is_not_utf8_costs_its_own_series_alone(tmp_path) -> None:
    names = pa.Array.from_buffers(
        pa.string(),
        2,
        [None, pa.py_buffer(np.array([0, 4, 8], np.int32)), pa.py_buffer(b"Rom\xe9Wien")],
    )
    path = tmp_path / "names.parquet"
    pq.write_table(pa.table({"item_id": names, "target": [[1.0], [2.0]]}), path)
    drop, record = ParquetSource(path=str(path), layout="series").records()
    assert drop == Drop(item_id="names_0", source="names", reason="not_utf8")
    assert record.item_id == "Wien"


def test_file_without_rows_or_target_is_named(tmp_path) -> None:
    path = tmp_path / "none.parquet"
    pq.write_table(pa.table({"target": pa.array([], pa.list_(pa.float32()))}), path)
    with pytest.raises(DataError, match=r"none\.parquet: holds no rows"):
        ParquetSource(path=str(path)).units()
    pq.write_table(pa.table({"value": [1.0]}), path)
    with pytest.raises(DataError, match=r"none\.parquet: no column 'target'.*value.*layout: wide"):
        ParquetSource(path=str(path), layout="series").units()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"time_zone": "Europe/Rom"}, "there is no zone 'Europe/Rom'"),
        ({"columns": ("a", "a")}, "columns: .* has a name twice"),
        ({"id_columns": ()}, "id_columns: .* is empty"),
        ({"layout": "wide", "id_columns": ("a",)}, "id_columns are for layout: long"),
    ],
)
@pytest.mark.parametrize("source", [CsvSource, ParquetSource])
def test_options_that_do_not_fit_are_named(source, options, says) -> None:
    with pytest.raises(ValueError, match=says):
        source(path="x", **options)


def test_table_options_do_not_fit_rows_of_series() -> None:
    with pytest.raises(ValueError, match="layout is series; leave out time_zone"):
        ParquetSource(path="x", layout="series", time_zone="UTC")


def test_wide_source_refuses_what_a_forecast_may_take(tmp_path) -> None:
    hours = np.arange("2021-03-27T00", "2021-03-29T00", dtype="datetime64[h]")
    hours = hours[hours != np.datetime64("2021-03-28T02")]
    path = tmp_path / "local.csv"
    path.write_text("date,a\n" + "".join(f"{hour},{row}\n" for row, hour in enumerate(hours)))
    with pytest.raises(DataError, match=r"local\.csv, column 'date', row 27: .*time_zone"):
        list(CsvSource(path=str(path)).records())
    (record,) = CsvSource(path=str(path), time_zone="Europe/Berlin").records()
    np.testing.assert_array_equal(record.values, np.arange(47))
    assert record.start == dt.datetime(2021, 3, 26, 23)
    assert np.isnan(read_table(path).values_LC).sum() == 1


@pytest.mark.parametrize("target", [[1.0, 2.0], [["a"], ["b"]], [[[[1.0]]], [[[2.0]]]]])
def test_target_that_holds_no_lists_of_numbers_is_refused(tmp_path, target) -> None:
    pq.write_table(pa.table({"target": target}), tmp_path / "kind.parquet")
    with pytest.raises(DataError, match=r"kind\.parquet: column 'target' holds .*lists of numbers"):
        ParquetSource(path=str(tmp_path / "kind.parquet"), layout="series").units()


def test_broken_series_costs_itself_alone(tmp_path) -> None:
    rows = {"target": [[1.0], None, [2.0]], "start": ["2020-01-01", "2020-01-01", "soon"]}
    pq.write_table(pa.table(rows), tmp_path / "some.parquet")
    found = list(ParquetSource(path=str(tmp_path / "some.parquet")).records())
    assert [getattr(item, "reason", "kept") for item in found] == [
        "kept",
        "not_numeric",
        "bad_timestamp",
    ]


def test_counts_of_rows_in_the_footer_must_agree(tmp_path) -> None:
    path = tmp_path / "count.parquet"
    pq.write_table(pa.table({"target": [[float(row)] for row in range(300)]}), path)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    three, one = b"\xd8\x04", b"\xc8\x01"  # 300 and 100 as Thrift writes them
    places = [at for at in range(footer, len(whole)) if whole[at : at + 2] == three]
    assert len(places) >= 3  # of the file, of the row group, of its column
    refused = 0
    for place in places:
        path.write_bytes(whole[:place] + one + whole[place + 2 :])
        found = None
        with suppress(DataError):
            found = len(list(ParquetSource(path=str(path)).records()))
        assert found in (None, 300)
        refused += found is None
    assert refused >= 2


def test_column_that_stands_twice_is_refused(tmp_path) -> None:
    table = pa.table([pa.array([[1.0]])] + [pa.array(["a"])] * 2, ["target", "freq", "freq"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: column 'freq' stands twice"):
        ParquetSource(path=str(tmp_path / "twice.parquet")).units()


def test_wide_source_refuses_a_step_that_changes(tmp_path) -> None:
    hours = np.arange(96).astype("datetime64[h]")
    days = np.datetime64("1970-01-05", "D") + np.arange(9)
    times = [*map(str, hours), *(f"{day}T00" for day in days)]
    path = tmp_path / "steps.csv"
    path.write_text("date,a\n" + "".join(f"{time}:00,1\n" for time in times))
    with pytest.raises(DataError, match=r"steps\.csv, column 'date', row 97: .* 1 day"):
        list(CsvSource(path=str(path)).records())
