from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import blocks
from data_pipeline.sources.npy import NpySource

TABLE_LC = np.arange(24, dtype=np.float64).reshape(6, 4)


def save(folder: Path, values: np.ndarray, name: str = "data.npy") -> NpySource:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, values)
    return NpySource(path=name).anchored(folder)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i2", "i8", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_columns_are_variates_whatever_type_and_order(tmp_path, dtype, order) -> None:
    values_LC = np.asarray(TABLE_LC, dtype, order=order)
    records = list(save(tmp_path, values_LC).records())
    assert [record.variate for record in records] == [0, 1, 2, 3]
    for record, expected in zip(records, values_LC.T, strict=True):
        assert record.values.dtype == np.float32
        np.testing.assert_array_equal(record.values, expected.astype(np.float32))


def test_array_of_one_axis_is_one_series(tmp_path) -> None:
    (record,) = save(tmp_path, np.array([1.0, np.nan, 3.0])).records()
    np.testing.assert_array_equal(record.values, np.array([1, np.nan, 3], np.float32))


@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_of_variates_add_up_to_the_file(tmp_path, monkeypatch, order) -> None:
    source = save(tmp_path, np.asarray(TABLE_LC, order=order))
    whole = list(source.records())
    monkeypatch.setattr(blocks, "UNIT_BYTES", 40)  # a variate takes 24 bytes as float32
    units = source.units()
    assert [unit.part for unit in units] == [0, 1, 2]
    parts = [record for unit in reversed(units) for record in reversed(list(source.read(unit)))]
    for record, expected in zip(reversed(parts), whole, strict=True):
        assert (record.item_id, record.variate) == (expected.item_id, expected.variate)
        np.testing.assert_array_equal(record.values, expected.values)


@pytest.mark.parametrize("order", ["C", "F"])
def test_file_of_many_chunks_is_read_rightly(tmp_path, monkeypatch, order) -> None:
    monkeypatch.setattr("data_pipeline.sources.npy._CHUNK_BYTES", 80)
    values_LC = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)
    records = list(save(tmp_path, np.asarray(values_LC, order=order)).records())
    np.testing.assert_array_equal([record.values for record in records], values_LC.T)


def test_folders_name_domain_and_data_set_as_utsd_does(tmp_path) -> None:
    for name in ("utsd/Energy/wind/0.npy", "utsd/Energy/wind/1.npy", "utsd/other.npy"):
        save(tmp_path, TABLE_LC[:, 0], name)
    records = list(NpySource(path="utsd/**/*.npy").anchored(tmp_path).records())
    assert [(record.item_id, record.domain, record.source) for record in records] == [
        ("Energy/wind/0", "Energy", "wind"),
        ("Energy/wind/1", "Energy", "wind"),
        ("other", "unspecified", "other"),
    ]


def test_values_beyond_float32_become_infinite_without_a_warning(tmp_path, recwarn) -> None:
    (record,) = save(tmp_path, np.array([1e39, -1e39, 1e38])).records()
    np.testing.assert_array_equal(record.values, np.array([np.inf, -np.inf, 1e38], np.float32))
    assert not recwarn.list


def test_file_without_rows_gives_empty_series(tmp_path) -> None:
    records = list(save(tmp_path, np.zeros((0, 3))).records())
    assert [record.values.size for record in records] == [0, 0, 0]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((2, 3, 4)), "3 axes (2 x 3 x 4)"),
        (np.zeros((5, 0)), "no variate (5 x 0)"),
        (np.zeros(3, complex), "complex128"),
        (np.array(["a", "b"]), "<U1"),
        (np.zeros(3, "datetime64[s]"), "datetime64[s]"),
    ],
)
def test_what_is_no_table_of_numbers_is_refused(tmp_path, values, says) -> None:
    source = save(tmp_path, values)
    with pytest.raises(DataError) as error:
        source.units()
    assert "data.npy" in str(error.value)
    assert says in str(error.value)
    assert "numpy.save" in str(error.value)


def test_objects_and_archives_are_refused(tmp_path) -> None:
    np.save(tmp_path / "objects.npy", np.array([[1], [2, 3]], object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", TABLE_LC)
    for name, says in (("objects.npy", "object"), ("archive.npz", "several arrays")):
        with pytest.raises(DataError, match=says):
            NpySource(path=name).anchored(tmp_path).units()


@pytest.mark.parametrize("cut", [0, 5, 60, 200, -1])
def test_file_cut_short_is_refused_by_name(tmp_path, cut) -> None:
    source = save(tmp_path, TABLE_LC)
    file = tmp_path / "data.npy"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"data\.npy"):
        source.units()


@pytest.mark.parametrize("old", [b"{'descr'", b"'<f8'", b"False", b"(6, 4)", b"}"])
def test_header_that_is_no_description_is_refused_by_name(tmp_path, old) -> None:
    source = save(tmp_path, TABLE_LC)
    file = tmp_path / "data.npy"
    whole = file.read_bytes()
    for byte in b"([{'\\ 9\n":
        file.write_bytes(whole.replace(old, bytes([byte]) * len(old), 1))
        with pytest.raises(DataError, match=r"data\.npy"):
            source.units()


def test_bytes_behind_the_values_are_refused(tmp_path) -> None:
    source = save(tmp_path, TABLE_LC)
    with (tmp_path / "data.npy").open("ab") as handle:
        handle.write(b"abc")
    with pytest.raises(DataError, match="3 bytes behind its 6 x 4 values"):
        source.units()


def test_file_cut_while_it_is_read_is_refused(tmp_path, monkeypatch) -> None:
    source = save(tmp_path, TABLE_LC)
    fromfile = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *arguments: fromfile(*arguments)[:-2])
    with pytest.raises(DataError, match=r"data\.npy: ends 2 values early"):
        list(source.records())


def test_name_of_a_file_that_is_no_utf_8_is_refused(tmp_path) -> None:
    save(tmp_path, TABLE_LC)
    (tmp_path / "data.npy").rename(tmp_path / "d\udcff.npy")
    with pytest.raises(ConfigError, match=r"d\\udcff\.npy' is no UTF-8; rename it"):
        NpySource(path=str(tmp_path / "*.npy")).units()
