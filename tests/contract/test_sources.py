"""What every source of series must do. A new source adds one example to source_examples.py."""

import pickle
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from source_examples import EXAMPLES, EXPECTED

from data_pipeline.config import decode_corpus_config
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources import SOURCE_TYPES

# Those that read files; the others make their series up.
FILE_SOURCE_TYPES = [source for source in SOURCE_TYPES if "path" in source.__dataclass_fields__]


def example(source_type: type, folder: Path):
    assert source_type in EXAMPLES, f"{source_type.__name__} needs an example"
    return EXAMPLES[source_type](folder).anchored(folder)


@pytest.fixture(params=SOURCE_TYPES, ids=lambda source: source.type)
def source(request, tmp_path):
    return example(request.param, tmp_path)


@pytest.fixture(params=FILE_SOURCE_TYPES, ids=lambda source: source.type)
def file_source(request, tmp_path):
    return example(request.param, tmp_path)


def series_of(source) -> list[SeriesRecord]:
    items = list(source.records())
    assert not any(isinstance(item, Drop) for item in items)
    return items


def test_every_series_is_float32_of_one_axis(source) -> None:
    records = series_of(source)
    assert len(records) == len(EXPECTED)
    for record in records:
        assert record.values.dtype == np.float32
        assert record.values.ndim == 1


def test_every_value_arrives_with_nan_where_it_is_missing(file_source) -> None:
    for record, expected in zip(series_of(file_source), EXPECTED, strict=True):
        np.testing.assert_array_equal(record.values, expected)


def test_every_series_is_named(source) -> None:
    records = series_of(source)
    assert len({(record.item_id, record.variate) for record in records}) == len(records)
    assert all(record.item_id and record.source and record.domain for record in records)


def test_reading_twice_gives_the_same(source) -> None:
    first, second = series_of(source), series_of(source)
    assert [record.item_id for record in first] == [record.item_id for record in second]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_units_are_the_same_every_time_and_hold_every_series(source) -> None:
    units = source.units()
    assert units == source.units()
    assert len(set(units)) == len(units)
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    names = [(record.item_id, record.variate) for part in parts for record in part]
    assert names == [(record.item_id, record.variate) for record in series_of(source)]


def test_user_overrides_domain_source_and_freq(source) -> None:
    for record in series_of(replace(source, domain="IoT", source="mine", freq="4s")):
        assert (record.domain, record.source, record.freq) == ("IoT", "mine", "4s")


def test_local_files_are_listed(file_source) -> None:
    files = file_source.files()
    assert files
    assert all(file.is_absolute() and file.is_file() for file in files)


def test_tag_and_fields_survive_the_configuration(source) -> None:
    given = {
        field.name: getattr(source, field.name)
        for field in fields(source)
        if getattr(source, field.name) != field.default
    }
    plain = {"type": source.type, **given, "licence": "CC0"}
    config = decode_corpus_config({"sources": [plain]}, where="corpus.yaml")
    assert config.sources == [replace(source, licence="CC0")]
    assert config.as_json()["sources"][0]["type"] == source.type


def test_source_can_be_sent_to_another_process(source) -> None:
    assert pickle.loads(pickle.dumps(source)) == source


def test_tags_are_unique() -> None:
    tags = [source.type for source in SOURCE_TYPES]
    assert len(set(tags)) == len(tags)
