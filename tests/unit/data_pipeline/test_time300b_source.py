import json
import math
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import blocks
from data_pipeline.sources.time300b import Time300bSource

SEQUENCES = [np.arange(5), np.arange(7) * 10, np.array([]), np.arange(100, 109), np.array([3.5])]


def write_leaf(folder: Path, *, num_files: int = 3, dtype: str = "float32", scaled=True) -> dict:
    """Write a leaf folder the way Time-MoE does: one array, cut into files of equal length."""
    folder.mkdir(parents=True, exist_ok=True)
    scales, stored, offset = [], [], 0
    for number, sequence in enumerate(SEQUENCES):
        mean, std = float(number), float(number + 2)
        scales.append({"offset": offset, "length": len(sequence)})
        if scaled:
            scales[-1] |= {"mean": mean, "std": std, "id": f"a}}b {number}"}
            sequence = (sequence - mean) / std
        stored.append(sequence)
        offset += len(sequence)
    values = np.concatenate(stored).astype(dtype)
    length = math.ceil(len(values) / num_files)
    meta = {"num_sequences": len(SEQUENCES), "dtype": dtype, "files": {}, "scales": scales}
    for number in range(num_files):
        part = values[number * length : (number + 1) * length]
        name = f"data-{number + 1}-of-{num_files}.bin"
        part.tofile(folder / name)
        meta["files"][name] = len(part)
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def check_values(records: list, tolerance: float = 1e-6) -> None:
    for record, expected in zip(records, SEQUENCES, strict=True):
        assert record.values.dtype == np.float32
        np.testing.assert_allclose(record.values, expected, rtol=tolerance, atol=tolerance)


# 11 files: as text, data-10-of-11.bin would come before data-2-of-11.bin.
@pytest.mark.parametrize("num_files", [1, 3, 11])
def test_sequences_that_straddle_files_are_restored(tmp_path, num_files) -> None:
    write_leaf(tmp_path / "nature" / "weather", num_files=num_files)
    check_values(list(Time300bSource(path=str(tmp_path)).records()))


# The tolerance is the rounding of the stored values, of size 9, times a std of at most 6.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float16", 0.05)])
def test_stored_types_are_read(tmp_path, dtype, tolerance) -> None:
    write_leaf(tmp_path, dtype=dtype)
    check_values(list(Time300bSource(path=str(tmp_path)).records()), tolerance)


def test_sequences_without_mean_and_std_come_as_stored(tmp_path) -> None:
    write_leaf(tmp_path, scaled=False)
    check_values(list(Time300bSource(path=str(tmp_path)).records()), tolerance=0)


def test_folders_name_domain_data_set_and_series(tmp_path) -> None:
    for leaf in ("nature/weather", "web/wiki/daily", "loose"):
        write_leaf(tmp_path / leaf)
    records = list(Time300bSource(path=str(tmp_path)).records())
    assert [(r.item_id, r.domain, r.source) for r in records[:: len(SEQUENCES)]] == [
        ("loose/0", "unspecified", "loose"),
        ("nature/weather/0", "Nature", "weather"),
        ("web/wiki/daily/0", "Web", "wiki_daily"),
    ]
    (*_, last) = Time300bSource(path="*/w*").anchored(tmp_path).records()
    assert (last.item_id, last.domain) == ("web/wiki/daily/4", "Web")


def test_ranges_of_sequences_add_up_to_the_folder(tmp_path, monkeypatch) -> None:
    write_leaf(tmp_path)
    source = Time300bSource(path=str(tmp_path))
    names = [record.item_id for record in source.records()]
    monkeypatch.setattr(blocks, "UNIT_BYTES", 40)  # all 22 values take 88 bytes
    units = source.units()
    assert [unit.part for unit in units] == [0, 1, 2]
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    records = [record for part in parts for record in part]
    assert [record.item_id for record in records] == names
    check_values(records)


def test_small_pieces_of_text_and_values_are_put_together(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.json_stream._CHUNK_CHARS", 7)
    monkeypatch.setattr("data_pipeline.sources.time300b._CHUNK_VALUES", 2)
    write_leaf(tmp_path)
    check_values(list(Time300bSource(path=str(tmp_path)).records()))


def test_units_do_not_read_the_list_of_sequences(tmp_path) -> None:
    meta = write_leaf(tmp_path)
    text = json.dumps({**meta, "scales": []}).replace("[]", "[{broken")
    (tmp_path / "meta.json").write_text(text)
    (unit,) = Time300bSource(path=str(tmp_path)).units()
    assert unit.size_bytes == 22 * 4


def test_keys_may_come_in_any_order(tmp_path) -> None:
    meta = write_leaf(tmp_path)
    text = json.dumps(dict(reversed([*meta.items(), ("more", {"a": [1, "]"]})])), indent=1)
    (tmp_path / "meta.json").write_text(text)
    check_values(list(Time300bSource(path=str(tmp_path)).records()))


def test_meta_that_changed_is_read_again(tmp_path) -> None:
    meta = write_leaf(tmp_path)
    source = Time300bSource(path=str(tmp_path))
    list(source.records())
    meta["scales"][0]["mean"] = 1000.5
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert next(iter(source.records())).values[0] == 1000.5


BREAKS = [
    ({"dtype": "object"}, "dtype is 'object'"),
    ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
    ({"dtype": 4}, "dtype is 4"),
    ({"num_sequences": 6}, "num_sequences is 6, but `scales` lists 5"),
    ({"num_sequences": "5"}, "num_sequences is '5'"),
    ({"files": {}}, "`files`"),
    ({"files": {"data-1-of-1.bin": 22}}, "data-1-of-1.bin: is missing"),
    ({"files": {"../data-1-of-1.bin": 22}}, "got ../data-1-of-1.bin"),
    ({"files": {"data-1-of-3.bin": 8, "data-2-of-3.bin": 8}}, "data-1-of-2.bin to"),
    (
        {"files": {"data-1-of-3.bin": 8, "data-2-of-3.bin": 8, "data-3-of-3.bin": 7}},
        "data-3-of-3.bin: has 24 bytes, but meta.json states 7 values",
    ),
    ({"scales": None}, "cannot be read as JSON"),
    ({"scales": [{"offset": 0}] * 5}, "sequence 0: expected offset and length"),
    ({"scales": [{"offset": 0, "length": 1, "mean": 1.0}] * 5}, "both or neither"),
    ({"scales": [{"offset": 0, "length": 1, "mean": 0.0, "std": math.nan}] * 5}, "must be finite"),
    ({"scales": [{"offset": 20, "length": 3}] * 5}, "offset 20 and length 3 lie outside of the 22"),
    ({"scales": [{"offset": -1, "length": 3}] * 5}, "offset -1 and length 3"),
    ({"scales": [{"offset": 2**62, "length": 2**62}] * 5}, "lie outside"),
    ({"scales": [{"offset": 2**70, "length": 1}] * 5}, "sequence 0"),
]


@pytest.mark.parametrize(("change", "says"), BREAKS, ids=[says for _, says in BREAKS])
def test_what_does_not_add_up_is_refused(tmp_path, change, says) -> None:
    meta = write_leaf(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(DataError) as error:
        list(Time300bSource(path=str(tmp_path)).records())
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"num_sequences": 1}', b"\x89PNG\r\n", b'{"a\xff": 1}', b"[" * 99999],
)
def test_meta_that_is_no_description_is_refused(tmp_path, content) -> None:
    write_leaf(tmp_path)
    (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json"):
        Time300bSource(path=str(tmp_path)).units()


@pytest.mark.parametrize("cut", [-1, 300])
def test_meta_cut_short_is_refused(tmp_path, cut) -> None:
    write_leaf(tmp_path)
    file = tmp_path / "meta.json"
    file.write_text(file.read_text()[:cut])
    with pytest.raises(DataError, match=r"meta\.json"):
        list(Time300bSource(path=str(tmp_path)).records())


def test_file_cut_short_is_refused(tmp_path) -> None:
    write_leaf(tmp_path)
    file = tmp_path / "data-2-of-3.bin"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"data-2-of-3\.bin: has 29 bytes"):
        Time300bSource(path=str(tmp_path)).units()


def test_values_beyond_float32_become_infinite(tmp_path, recwarn) -> None:
    meta = write_leaf(tmp_path)
    meta["scales"][0] |= {"mean": 1e39, "std": 1.0}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert np.isposinf(next(iter(Time300bSource(path=str(tmp_path)).records())).values).all()
    assert not recwarn.list


def test_folder_without_data_is_a_mistake_of_the_user(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"meta\.json"):
        Time300bSource(path=str(tmp_path)).units()


def test_folder_whose_name_is_no_utf_8_is_refused(tmp_path) -> None:
    write_leaf(tmp_path / "nature" / "w\udcff")
    with pytest.raises(ConfigError, match=r"is no UTF-8; rename it"):
        Time300bSource(path=str(tmp_path)).units()
