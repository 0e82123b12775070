import datetime as dt
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.sources import blocks
from data_pipeline.sources.tsf import TsfSource

HEADER = """# Dataset Information
# A comment of the archive

@relation Test
@attribute series_name string
@attribute start_timestamp date
@frequency {frequency}
@horizon 8
@missing true
@equallength false
@data
"""
LINES = ["T1:1979-01-31 00-00-00:1.5,?,-3e1", "T2:1980-02-29 12-30-05:7", "T3::0,1,2,3"]


def write(
    folder: Path, lines: list[str] = LINES, *, header: str = HEADER, frequency="daily", end="\n"
):
    text = header.replace("{frequency}", frequency) + "\n".join(lines) + end
    (folder / "data.tsf").write_bytes(text.encode("latin-1"))
    return TsfSource(path=str(folder / "data.tsf"))


def test_every_line_is_a_series(tmp_path) -> None:
    records = list(write(tmp_path).records())
    assert [record.item_id for record in records] == ["data_T1", "data_T2", "data_T3"]
    assert [record.start for record in records] == [
        dt.datetime(1979, 1, 31),
        dt.datetime(1980, 2, 29, 12, 30, 5),
        None,
    ]
    expected = ([1.5, np.nan, -30], [7], [0, 1, 2, 3])
    for record, values in zip(records, expected, strict=True):
        np.testing.assert_array_equal(record.values, np.array(values, np.float32))
        assert (record.values.dtype, record.freq, record.source) == (np.float32, "D", "data")


@pytest.mark.parametrize(
    ("frequency", "alias"),
    [
        ("4_seconds", "4s"),
        ("minutely", "min"),
        ("10_minutes", "10min"),
        ("half_hourly", "30min"),
        ("hourly", "h"),
        ("weekly", "W"),
        ("monthly", "MS"),
        ("quarterly", "QS"),
        ("yearly", "YS"),
    ],
)
def test_names_of_frequencies_become_aliases(tmp_path, frequency, alias) -> None:
    assert next(iter(write(tmp_path, frequency=frequency).records())).freq == alias


def test_file_without_frequency_has_none(tmp_path) -> None:
    header = HEADER.replace("@frequency {frequency}\n", "")
    assert next(iter(write(tmp_path, header=header).records())).freq is None


def test_names_may_be_in_utf_8_or_latin_1(tmp_path) -> None:
    source = write(tmp_path, ["Zürich::1,2"])
    assert next(iter(source.records())).item_id == "data_Zürich"
    file = tmp_path / "data.tsf"
    file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-8"))
    assert next(iter(source.records())).item_id == "data_Zürich"


def test_windows_line_ends_and_blank_lines_change_nothing(tmp_path) -> None:
    source = write(tmp_path)
    expected = [record.values for record in source.records()]
    file = tmp_path / "data.tsf"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n  \r\n")
    for record, values in zip(source.records(), expected, strict=True):
        np.testing.assert_array_equal(record.values, values)


@pytest.mark.parametrize("unit_bytes", [1, 7, 30, 40, 64, 10**6])
def test_ranges_of_lines_add_up_to_the_file(tmp_path, monkeypatch, unit_bytes) -> None:
    source = write(tmp_path, [f"T{number}::{number},{number}.5" for number in range(30)])
    monkeypatch.setattr(blocks, "UNIT_BYTES", unit_bytes)
    units = source.units()
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    records = [record for part in parts for record in part]
    assert [record.item_id for record in records] == [f"data_T{number}" for number in range(30)]
    assert [record.values[1] for record in records] == [number + 0.5 for number in range(30)]
    assert unit_bytes > 1000 or len(units) > 1


def test_series_without_a_name_is_called_after_its_byte(tmp_path) -> None:
    header = "@frequency daily\n@data\n"
    source = write(tmp_path, ["1,2", "3,4"], header=header)
    names = [record.item_id for record in source.records()]
    assert names == [f"data_{len(header)}", f"data_{len(header) + 4}"]


def test_date_that_is_none_drops_its_series_alone(tmp_path) -> None:
    source = write(tmp_path, ["T1:yesterday:1,2", "T2:2020-01-01:3,4"])
    drop, record = source.records()
    assert drop == Drop(item_id="data_T1", source="data", reason="bad_timestamp")
    assert record.start == dt.datetime(2020, 1, 1)


def test_values_beyond_float32_become_infinite(tmp_path, recwarn) -> None:
    (record,) = write(tmp_path, ["T1::1e38,1e39,-1e400"]).records()
    np.testing.assert_array_equal(record.values, np.array([1e38, np.inf, -np.inf], np.float32))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("T2:1,2", "line 13: has 1 attributes before its values, but the header names 2"),
        ("T2::1,abc,3", "line 13: value 2 is 'abc', expected a number"),
        ("T2::1,,3", "line 13: value 2 is ''"),
        ("T2::1,2,", "line 13: value 3 is ''"),
        ("T2::", "line 13: value 1 is ''"),
        ("T2::1,2?", "line 13: value 2 is '2?'"),
        ("T2::1,2\xe9", "line 13: value 2 is '2\xe9'"),
        ("T2::1,1_0", "line 13: value 2 is '1_0'"),
    ],
)
def test_broken_line_is_named_by_its_number(tmp_path, monkeypatch, line, says) -> None:
    monkeypatch.setattr(blocks, "UNIT_BYTES", 10)
    source = write(tmp_path, ["T1::1,2", line, "T3::1"])
    with pytest.raises(DataError) as error:
        list(source.records())
    assert f"data.tsf, {says}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no line '@data'"),
        (b"@attribute series_name string\n", "no line '@data'"),
        (b"@attribute series_name\n@data\nT1:1\n", "line 1: '@attribute series_name'"),
        (b"\x89PNG\r\n\x1a\n\0\0", "line 1: "),
        (b"1,2,3\n@data\n1\n", "line 1: '1,2,3'"),
        (b"@frequency fortnightly\n@data\n1\n", "unknown @frequency 'fortnightly'"),
        (b"@frequency 0.5_hourly\n@data\n1\n", "unknown @frequency"),
        (b"@data\n", "holds no series"),
        (b"@data\n1,2\0\n", "zero bytes"),
    ],
)
def test_what_is_no_tsf_is_refused(tmp_path, content, says) -> None:
    (tmp_path / "data.tsf").write_bytes(content)
    with pytest.raises(DataError) as error:
        TsfSource(path=str(tmp_path / "data.tsf")).units()
    assert "data.tsf" in str(error.value)
    assert says in str(error.value)


def test_file_cut_short_within_its_last_line_is_refused(tmp_path) -> None:
    header = HEADER.replace("@equallength false", "@equallength true")
    whole = write(tmp_path, ["T1::1,2,3", "T2::4,5,6"], header=header, end="")
    assert len(list(whole.records())) == 2
    cut = write(tmp_path, ["T1::1,2,3", "T2::4,5"], header=header, end="")
    with pytest.raises(DataError, match="line 13: ends after 2 of 3 values"):
        list(cut.records())
