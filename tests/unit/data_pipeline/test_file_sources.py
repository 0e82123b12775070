import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import CsvSource, ParquetSource


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
