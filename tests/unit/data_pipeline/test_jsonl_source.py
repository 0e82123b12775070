import datetime as dt
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.sources import blocks
from data_pipeline.sources.jsonl import JsonlSource


def write(folder: Path, lines: list[object], name: str = "data.jsonl") -> JsonlSource:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    content = "".join(f"{text}\n" for text in texts).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return JsonlSource(path=str(folder / name))


def values_of(source: JsonlSource) -> list[list[float]]:
    return [record.values.tolist() for record in source.records()]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.json.gz", "data.jsonl.gz"])
def test_sequences_of_time_moe_are_read(tmp_path, name) -> None:
    source = write(tmp_path, [{"sequence": [1, 2.5]}, {"sequence": [3]}], name)
    assert values_of(source) == [[1, 2.5], [3]]
    assert [record.item_id for record in source.records()] == ["data_0", "data_23"]
    assert {record.source for record in source.records()} == {"data"}


def test_keys_of_gluonts_are_read(tmp_path) -> None:
    row = {"target": [1, 2], "start": "2020-01-01 06:00", "item_id": 7, "freq": "H"}
    (record,) = write(tmp_path, [row | {"feat_static_cat": [3]}]).records()
    assert record.start == dt.datetime(2020, 1, 1, 6)
    assert (record.item_id, record.freq, record.end) == ("7", "h", None)


def test_names_of_utsd_and_of_the_row_are_used(tmp_path) -> None:
    rows = [
        {"target": [1], "item_id": "Energy_wind_12"},
        {"target": [1], "domain": "Sales", "dataset": "shops"},
    ]
    records = list(write(tmp_path, rows).records())
    assert [(r.domain, r.source) for r in records] == [("Energy", "wind"), ("Sales", "shops")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2020-01-01", dt.datetime(2020, 1, 1)),
        ("2019-12-30/2020-01-05", dt.datetime(2019, 12, 30)),
        ("2020-03", dt.datetime(2020, 3, 1)),
        ("2020-01-01T06:00:00+02:00", dt.datetime(2020, 1, 1, 4)),
        ("2020-01-01 06:00:00.123456789", dt.datetime(2020, 1, 1, 6, 0, 0, 123456)),
        ("", None),
        (None, None),
    ],
)
def test_start_is_read_in_every_spelling(tmp_path, text, expected) -> None:
    (record,) = write(tmp_path, [{"target": [1], "start": text}]).records()
    assert record.start == expected


@pytest.mark.parametrize("start", ["yesterday", "12", 5, [1], "2020-13-45", "9999-99-99x"])
def test_start_that_is_none_drops_its_series_alone(tmp_path, start) -> None:
    drop, record = write(tmp_path, [{"target": [1], "start": start}, {"target": [2]}]).records()
    assert drop == Drop(item_id="data_0", source="data", reason="bad_timestamp")
    assert record.values.tolist() == [2]


def test_every_spelling_of_missing_is_nan(tmp_path) -> None:
    (record,) = write(tmp_path, ['{"target": [1, null, NaN, "NaN", "Nan", 2]}']).records()
    np.testing.assert_array_equal(record.values, np.float32([1, *[np.nan] * 4, 2]))


def test_values_beyond_float32_become_infinite(tmp_path, recwarn) -> None:
    (record,) = write(tmp_path, ['{"target": [1e38, 1e39, -1e400, "-Infinity"]}']).records()
    np.testing.assert_array_equal(record.values, np.float32([1e38, np.inf, -np.inf, -np.inf]))
    assert not recwarn.list


def test_list_of_lists_is_one_series_per_variate(tmp_path) -> None:
    records = list(write(tmp_path, [{"target": [[1, 2, 3], [4, 5]], "item_id": "a"}]).records())
    assert [(r.item_id, r.variate, r.values.tolist()) for r in records] == [
        ("a", 0, [1, 2, 3]),
        ("a", 1, [4, 5]),
    ]


@pytest.mark.parametrize(
    "target", ["abc", None, 5, {"a": 1}, ["x"], [1, [2]], [[1], 2], [[[1]]], [10**400], [{}]]
)
def test_target_of_no_numbers_drops_its_series_alone(tmp_path, target) -> None:
    drop, record = write(tmp_path, [{"target": target}, {"target": [1]}]).records()
    assert drop == Drop(item_id="data_0", source="data", reason="not_numeric")
    assert record.values.tolist() == [1]


@pytest.mark.parametrize("unit_bytes", [1, 9, 33, 100, 10**6])
def test_ranges_of_lines_add_up_to_the_file(tmp_path, monkeypatch, unit_bytes) -> None:
    source = write(tmp_path, [{"target": [number] * (number % 5)} for number in range(40)])
    expected = [(record.item_id, record.values.tolist()) for record in source.records()]
    monkeypatch.setattr(blocks, "UNIT_BYTES", unit_bytes)
    parts = [list(source.read(unit)) for unit in reversed(source.units())][::-1]
    records = [record for part in parts for record in part]
    assert [(record.item_id, record.values.tolist()) for record in records] == expected
    assert len(expected) == 40


def test_packed_file_is_one_unit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "UNIT_BYTES", 10)
    source = write(tmp_path, [{"target": [number]} for number in range(20)], "data.jsonl.gz")
    assert len(source.units()) == 1
    assert values_of(source) == [[number] for number in range(20)]


@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_objects_is_read_one_by_one(tmp_path, monkeypatch, indent) -> None:
    monkeypatch.setattr(blocks, "UNIT_BYTES", 10)
    monkeypatch.setattr("data_pipeline.sources.json_stream._CHUNK_CHARS", 5)
    text = json.dumps([{"sequence": [1, 2]}, {"sequence": [3]}], indent=indent)
    source = write(tmp_path, [text], "data.json")
    assert len(source.units()) == 1
    assert values_of(source) == [[1, 2], [3]]
    assert [record.item_id for record in source.records()] == ["data_0", "data_1"]


def test_byte_order_mark_is_no_part_of_the_first_line(tmp_path) -> None:
    for text in ('{"target": [1]}', '[{"target": [1]}]'):
        (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n")
        assert values_of(JsonlSource(path=str(tmp_path / "data.jsonl"))) == [[1]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"target": [1, 2', "is no JSON"),
        (b"\xff\xfe", "is no JSON ('utf-8' codec"),
        (b"[1, 2]", "expected an object such as"),
        (b"3", "expected an object such as"),
        (b'{"values": [1]}', "target or sequence, got the keys 'values'"),
        (b"{}", "of an empty object"),
        (b'{"target": [1], "sequence": [1]}', "under one of the keys"),
        (b'{"target": [1], "item_id": [1]}', "item_id is [1]"),
        (b'{"target": [1], "item_id": "\\ud800"}', "no text in UTF-8"),
        (b'{"target": [1], "domain": true}', "domain is True"),
        (b'{"target": ' + b"[" * 100_000, "is no JSON"),
        (b'{"target": [' + b"1" * 5000 + b"]}", "is no JSON"),
    ],
)
def test_broken_line_is_named_by_its_number(tmp_path, monkeypatch, line, says) -> None:
    monkeypatch.setattr(blocks, "UNIT_BYTES", 20)
    (tmp_path / "data.jsonl").write_bytes(b'{"target": [1]}\n\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(JsonlSource(path=str(tmp_path / "data.jsonl")).records())
    assert "data.jsonl, line 3: " in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no series"),
        (b"\n \n", "holds no series"),
        (b"[]", "empty array"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "zero bytes"),
        (b'[{"target": [1]}, {"tar', "no JSON after 1 objects"),
        (b'[{"target": [1]}] 5', "no JSON after 1 objects"),
        (b'[{"target": [1]}, 5]', "object 2: expected an object"),
        (b'[{"target": [1]} {"target": [2]}]', "no JSON after 1 objects"),
        (b'[{"target": [1], "a": "\xff"}]', "no JSON after 0 objects"),
        (gzip.compress(b'{"target": [1]}\n' * 9, mtime=0)[:-9], "cannot be read"),
        (gzip.compress(b'{"target": [1]}\n' * 9, mtime=0)[:-4] + b"abcd", "cannot be read"),
    ],
)
def test_broken_file_is_refused_by_name(tmp_path, content, says) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    with pytest.raises(DataError) as error:
        list(JsonlSource(path=str(tmp_path / "data.jsonl")).records())
    assert "data.jsonl" in str(error.value)
    assert says in str(error.value)


def test_line_without_an_end_is_refused_before_it_fills_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.lines._LONGEST_LINE", 50)
    source = write(tmp_path, [{"target": [1]}, {"target": [1] * 100}])
    with pytest.raises(DataError, match="line 2: is longer than 50 bytes"):
        list(source.records())


def test_file_cut_while_it_is_read_is_refused(tmp_path) -> None:
    source = write(tmp_path, [{"target": [1]}] * 10_000)
    records = source.records()
    next(records)
    (tmp_path / "data.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="changed while it was read"):
        list(records)
