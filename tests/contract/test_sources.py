"""What every source of series must do. A new source adds one example below."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_examples import EXPECTED, FORMAT_EXAMPLES

from data_pipeline.config import decode_corpus_config
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources import SOURCE_TYPES, CsvSource, HubSource, ParquetSource


def csv_example(folder: Path) -> CsvSource:
    rows = ["1,8", "2,7", ",6", "4,5"]
    stamps = [f"2020-01-01 0{hour}:00" for hour in range(4)]
    lines = [f"{stamp},{row}" for stamp, row in zip(stamps, rows, strict=True)]
    (folder / "data.csv").write_text("\n".join(["date,a,b", *lines]) + "\n")
    return CsvSource(path="data.csv")


def parquet_example(folder: Path) -> ParquetSource:
    pq.write_table(pa.table({"target": list(EXPECTED)}), folder / "data.parquet")
    return ParquetSource(path="data.parquet")


def hub_example(folder: Path) -> HubSource:
    (folder / "copy").mkdir()
    rows = {"item_id": ["Web_wiki_0", "Web_wiki_1"], "target": list(EXPECTED)}
    pq.write_table(pa.table(rows), folder / "copy" / "data.parquet")
    return HubSource(path="copy")


EXAMPLES: dict[type, Callable[[Path], object]] = {
    CsvSource: csv_example,
    ParquetSource: parquet_example,
    HubSource: hub_example,
    **FORMAT_EXAMPLES,
}


@pytest.fixture(params=SOURCE_TYPES, ids=lambda source: source.type)
def source(request, tmp_path):
    assert request.param in EXAMPLES, f"{request.param.__name__} needs an example in this file"
    return EXAMPLES[request.param](tmp_path).anchored(tmp_path)


def series_of(source) -> list[SeriesRecord]:
    items = list(source.records())
    assert not any(isinstance(item, Drop) for item in items)
    return items


def test_every_series_arrives_as_float32_with_nan(source) -> None:
    records = series_of(source)
    for record, expected in zip(records, EXPECTED, strict=True):
        assert record.values.dtype == np.float32
        assert record.values.ndim == 1
        np.testing.assert_array_equal(record.values, expected)


def test_every_series_is_named(source) -> None:
    records = series_of(source)
    assert len({(record.item_id, record.variate) for record in records}) == len(records)
    assert all(record.item_id and record.source and record.domain for record in records)


def test_reading_twice_gives_the_same(source) -> None:
    first, second = series_of(source), series_of(source)
    assert [record.item_id for record in first] == [record.item_id for record in second]


def test_user_overrides_domain_source_and_freq(source) -> None:
    for record in series_of(replace(source, domain="IoT", source="mine", freq="4s")):
        assert (record.domain, record.source, record.freq) == ("IoT", "mine", "4s")


def test_local_files_are_listed(source) -> None:
    files = source.files()
    assert files
    assert all(file.is_absolute() and file.is_file() for file in files)


def test_tag_and_fields_survive_the_configuration(source) -> None:
    plain = {"type": source.type, "path": source.path, "licence": "CC0"}
    config = decode_corpus_config({"sources": [plain]}, where="corpus.yaml")
    assert config.sources == [replace(source, licence="CC0")]
    assert config.as_json()["sources"][0]["type"] == source.type


def test_source_can_be_sent_to_another_process(source) -> None:
    assert pickle.loads(pickle.dumps(source)) == source


def test_tags_are_unique() -> None:
    tags = [source.type for source in SOURCE_TYPES]
    assert len(set(tags)) == len(tags)
