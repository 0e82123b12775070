"""Files in the layout that gluonts 0.17.0 writes, made with pyarrow alone."""

import datetime as dt
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import DataError
from data_pipeline.record import Drop
from data_pipeline.sources import blocks
from data_pipeline.sources.gluonts import GluontsSource

START = dt.datetime(2021, 3, 1, 5)
NUM_SERIES = 7
ROWS_PER_BATCH = 2
FORMATS = ["file", "packed", "stream", "parquet"]


def target_of(number: int, variates: int) -> np.ndarray:
    """Values of a series, variates x time; lengths differ between series."""
    return np.arange(variates * (number + 2), dtype=np.float64).reshape(variates, -1) + number


def rows(variates: int, *, is_flat: bool = True, is_named: bool = True) -> pa.Table:
    """Columns as ArrowWriter makes them of a target with one axis (0 variates) or two."""
    targets = [target_of(number, max(1, variates)) for number in range(NUM_SERIES)]
    columns: dict[str, object] = {"start": pa.array([START] * NUM_SERIES, pa.timestamp("us"))}
    if variates and is_flat:
        columns["target._np_shape"] = [list(target.shape) for target in targets]
    is_nested = variates and not is_flat
    columns["target"] = [t.tolist() if is_nested else t.ravel() for t in targets]
    if is_named:
        columns["item_id"] = [f"s{number}" for number in range(NUM_SERIES)]
    columns["feat_static_cat"] = [[number] for number in range(NUM_SERIES)]
    return pa.table(columns)


def write(folder: Path, table: pa.Table, form: str = "file", freq: str | None = None):
    if freq:
        table = table.replace_schema_metadata({"freq": freq})
    file = folder / "data.feather"
    if form == "parquet":
        pq.write_table(table, file, row_group_size=ROWS_PER_BATCH)
    else:
        make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression="lz4" if form == "packed" else None)
        with make(str(file), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=ROWS_PER_BATCH)
    return GluontsSource(path=str(file))


@pytest.mark.parametrize("form", FORMATS)
def test_target_of_one_axis_is_one_series(tmp_path, form) -> None:
    records = list(write(tmp_path, rows(0), form, freq="15T").records())
    assert [record.item_id for record in records] == [f"s{number}" for number in range(NUM_SERIES)]
    for number, record in enumerate(records):
        np.testing.assert_array_equal(record.values, target_of(number, 1)[0].astype(np.float32))
        assert (record.start, record.freq, record.variate) == (START, "15min", 0)


@pytest.mark.parametrize("is_flat", [True, False])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("variates", [1, 3])
def test_target_of_two_axes_is_one_series_per_variate(tmp_path, form, is_flat, variates) -> None:
    records = list(write(tmp_path, rows(variates, is_flat=is_flat), form).records())
    assert len(records) == NUM_SERIES * variates
    for index, record in enumerate(records):
        number, variate = divmod(index, variates)
        expected = target_of(number, variates)[variate]
        np.testing.assert_array_equal(record.values, expected.astype(np.float32))
        assert (record.item_id, record.variate, record.freq) == (f"s{number}", variate, None)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows_at_once", [1, 64])
def test_names_and_values_do_not_depend_on_units(tmp_path, monkeypatch, form, rows_at_once) -> None:
    monkeypatch.setattr("data_pipeline.sources.gluonts._ROWS_AT_ONCE", rows_at_once)
    source = write(tmp_path, rows(3, is_named=False), form)
    expected = [(r.item_id, r.variate, r.values.tolist()) for r in source.records()]
    names = list(dict.fromkeys(name for name, *_ in expected))
    assert names == [f"data_{number // 2}_{number % 2}" for number in range(NUM_SERIES)]
    monkeypatch.setattr(blocks, "UNIT_BYTES", 1)
    units = source.units()
    assert len(units) == (1 if form == "stream" else 4)
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    records = [(r.item_id, r.variate, r.values.tolist()) for part in parts for r in part]
    assert records == expected


def test_frequency_of_a_row_comes_before_that_of_the_file(tmp_path) -> None:
    table = rows(0).append_column("freq", pa.array(["H"] * NUM_SERIES))
    assert next(write(tmp_path, table, freq="D").records()).freq == "h"


def test_year_that_no_calendar_has_drops_its_series_alone(tmp_path) -> None:
    start = pa.array([2**62, 0], pa.timestamp("us"))
    table = pa.table({"start": start, "target": [[1.0], [2.0]]})
    drop, record = write(tmp_path, table).records()
    assert drop == Drop(item_id="data_0_0", source="data", reason="bad_timestamp")
    assert record.start == dt.datetime(1970, 1, 1)


def test_shape_that_does_not_fit_is_refused(tmp_path) -> None:
    for shape in ([2, 2], [3], [1, 1, 3], [-1, -3], [None, 3], None):
        shapes = pa.array([shape], pa.list_(pa.int64()))
        table = pa.table({"target._np_shape": shapes, "target": [[1.0, 2.0, 3.0]]})
        with pytest.raises(DataError, match="target of 3 values has the shape"):
            list(write(tmp_path, table).records())


def test_columns_that_are_no_lists_are_refused(tmp_path) -> None:
    for table, says in (
        (pa.table({"value": [1.0]}), "no column 'target'"),
        (pa.table({"target._np_shape": [[1, 1]], "target": [1.0]}), "'target' holds double"),
        (pa.table({"target._np_shape": [1], "target": [[1.0]]}), "_np_shape' holds int64"),
    ):
        with pytest.raises(DataError, match=says):
            list(write(tmp_path, table).records())


@pytest.mark.parametrize("form", FORMATS)
def test_file_cut_short_anywhere_is_refused(tmp_path, form) -> None:
    source = write(tmp_path, rows(3), form)
    file = tmp_path / "data.feather"
    whole = file.read_bytes()
    for length in range(0, len(whole), 97):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"data\.feather"):
            list(source.records())


def test_stream_cut_between_two_batches_is_refused(tmp_path) -> None:
    """Arrow reads such a file without a complaint."""
    source = write(tmp_path, rows(0).slice(0, 2 * ROWS_PER_BATCH), "stream")
    whole = (tmp_path / "data.feather").read_bytes()
    one_batch = write(tmp_path, rows(0).slice(0, ROWS_PER_BATCH), "stream")
    cut = whole[: len((tmp_path / "data.feather").read_bytes()) - 8]
    (tmp_path / "data.feather").write_bytes(cut)
    assert pa.ipc.open_stream(cut).read_all().num_rows == ROWS_PER_BATCH
    assert source == one_batch
    with pytest.raises(DataError, match=r"data\.feather: ends without the mark"):
        source.units()


@pytest.mark.parametrize("form", FORMATS)
def test_flipped_bytes_are_refused_or_read(tmp_path, form) -> None:
    source = write(tmp_path, rows(3), form)
    file = tmp_path / "data.feather"
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        file.write_bytes(damaged)
        with suppress(DataError):
            list(source.records())


@pytest.mark.parametrize("form", FORMATS)
def test_name_that_is_no_utf_8_is_refused(tmp_path, form) -> None:
    name = pa.StringArray.from_buffers(1, pa.py_buffer(np.int32([0, 2])), pa.py_buffer(b"a\xb4"))
    with pytest.raises(DataError, match="UTF8"):
        list(write(tmp_path, pa.table({"item_id": name, "target": [[1.0]]}), form).records())


@pytest.mark.parametrize("form", FORMATS)
def test_file_without_rows_is_refused_by_name(tmp_path, form) -> None:
    source = write(tmp_path, rows(0).slice(0, 0), form)
    with pytest.raises(DataError, match=r"data\.feather: holds no series"):
        list(source.records())


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"date,a\n2020,1\n"])
def test_other_files_are_refused(tmp_path, content) -> None:
    (tmp_path / "data.arrow").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.arrow: cannot be read as a data set of GluonTS"):
        GluontsSource(path=str(tmp_path / "data.arrow")).units()


def test_name_of_a_column_that_is_no_utf_8_is_refused(tmp_path) -> None:
    source = write(tmp_path, rows(0))
    file = tmp_path / "data.feather"
    file.write_bytes(file.read_bytes().replace(b"target", b"t\xffrget"))
    with pytest.raises(DataError, match=r"data\.feather: cannot be read .*utf-8"):
        source.units()
