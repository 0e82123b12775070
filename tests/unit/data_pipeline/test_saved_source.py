import datetime as dt
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import blocks
from data_pipeline.sources.saved import SavedSource

LENGTHS = (50, 7, 130, 1, 33)


def utsd() -> datasets.Dataset:
    """Rows in the columns of UTSD on the hub."""
    generator = np.random.default_rng(0)
    return datasets.Dataset.from_dict(
        {
            "item_id": [f"Energy_wind_farms_{index}" for index in range(len(LENGTHS))],
            "start": [dt.datetime(2020, 1, 1), None, dt.datetime(2021, 1, 1), None, None],
            "freq": ["H", "4S", "H", "H", None],
            "target": [generator.normal(size=length).astype(np.float32) for length in LENGTHS],
        }
    )


def save(folder: Path, rows: datasets.Dataset, **options: int) -> SavedSource:
    rows.save_to_disk(str(folder / "data"), **options)
    return SavedSource(path=str(folder / "data"))


def loaded_targets(folder: Path) -> list[np.ndarray]:
    return [np.array(row, np.float32) for row in datasets.load_from_disk(str(folder))["target"]]


def test_every_row_is_a_series_as_datasets_itself_reads_it(tmp_path) -> None:
    records = list(save(tmp_path, utsd()).records())
    for record, target in zip(records, loaded_targets(tmp_path / "data"), strict=True):
        np.testing.assert_array_equal(record.values, target)
        assert record.values.dtype == np.float32
        assert (record.domain, record.source) == ("Energy", "wind_farms")
    assert [record.freq for record in records] == ["h", "4s", "h", "h", None]
    assert records[2].start == dt.datetime(2021, 1, 1)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("rows_at_once", [1, 64])
def test_ranges_of_rows_add_up_to_the_folder(tmp_path, monkeypatch, num_shards, rows_at_once):
    monkeypatch.setattr("data_pipeline.sources.saved._ROWS_AT_ONCE", rows_at_once)
    source = save(tmp_path, utsd().remove_columns("item_id"), num_shards=num_shards)
    expected = [(record.item_id, record.values.tolist()) for record in source.records()]
    names = [name for name, _ in expected]
    assert names[0] == "data_0_0"
    assert names[-1] == ("data_0_4" if num_shards == 1 else "data_1_1")
    monkeypatch.setattr(blocks, "UNIT_BYTES", 1)
    units = source.units()
    assert len(units) == len(LENGTHS)
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    assert [(r.item_id, r.values.tolist()) for part in parts for r in part] == expected
    targets = loaded_targets(tmp_path / "data")
    assert [values for _, values in expected] == [target.tolist() for target in targets]


def test_rows_picked_before_saving_are_the_rows_read(tmp_path) -> None:
    records = list(save(tmp_path, utsd().select([4, 0, 2])).records())
    assert [len(record.values) for record in records] == [33, 50, 130]


def test_variates_of_lotsa_share_their_item(tmp_path) -> None:
    target = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    columns = {"item_id": ["a"], "target": [target], "past_feat_dynamic_real": [[[0.0] * 3]]}
    list_of_lists = datasets.Features(
        item_id=datasets.Value("string"),
        target=datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        past_feat_dynamic_real=datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
    )
    array = datasets.Features({**list_of_lists, "target": datasets.Array2D((2, 3), "float32")})
    for index, features in enumerate((list_of_lists, array)):
        folder = tmp_path / str(index)
        records = list(save(folder, datasets.Dataset.from_dict(columns, features)).records())
        assert [(r.item_id, r.variate, r.values.tolist()) for r in records] == [
            ("a", variate, values) for variate, values in enumerate(target)
        ]


def test_pattern_takes_many_folders_in_order(tmp_path) -> None:
    for name in ("b", "a"):
        rows = datasets.Dataset.from_dict({"target": [[1.0, 2.0]]})
        rows.save_to_disk(str(tmp_path / "lotsa" / name))
    records = list(SavedSource(path="lotsa/*").anchored(tmp_path).records())
    assert [(r.item_id, r.source) for r in records] == [("a_0_0", "a"), ("b_0_0", "b")]


def test_split_is_chosen_by_name(tmp_path) -> None:
    rows = utsd().remove_columns("item_id")
    splits = datasets.DatasetDict(train=rows.select([0, 1]), test=rows.select([2]))
    splits.save_to_disk(str(tmp_path / "data"))
    (record,) = SavedSource(path=str(tmp_path / "data"), split="test").records()
    assert (len(record.values), record.item_id, record.source) == (130, "data_0_0", "data")
    for split in (None, "validation"):
        with pytest.raises(ConfigError, match="has the splits train, test"):
            SavedSource(path=str(tmp_path / "data"), split=split).units()


def test_only_split_needs_no_name_and_a_single_set_takes_none(tmp_path) -> None:
    datasets.DatasetDict(train=utsd()).save_to_disk(str(tmp_path / "one"))
    assert len(list(SavedSource(path=str(tmp_path / "one")).records())) == len(LENGTHS)
    single = save(tmp_path, utsd())
    with pytest.raises(ConfigError, match="without splits"):
        SavedSource(path=single.path, split="train").units()


def test_folder_that_was_not_saved_is_a_mistake_of_the_user(tmp_path) -> None:
    (tmp_path / "loose").mkdir()
    with pytest.raises(ConfigError, match="save_to_disk"):
        SavedSource(path=str(tmp_path / "loose")).units()
    with pytest.raises(ConfigError, match="no folder matches"):
        SavedSource(path=str(tmp_path / "none")).units()


def test_data_file_cut_short_anywhere_is_refused(tmp_path) -> None:
    source = save(tmp_path, utsd())
    (file,) = (tmp_path / "data").glob("*.arrow")
    whole = file.read_bytes()
    for length in range(0, len(whole), 61):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match=file.name):
            list(source.records())


def write_file(folder: Path, lengths: list[list[int]]) -> SavedSource:
    """Write a folder of one file, with one batch per list of lengths of its series."""
    schema = pa.schema([("target", pa.list_(pa.float32()))])
    with pa.ipc.new_stream(str(folder / "data.arrow"), schema) as writer:
        for rows in lengths:
            target = pa.array([np.ones(length, np.float32) for length in rows], schema[0].type)
            writer.write_batch(pa.record_batch([target], schema=schema))
    state = {"_data_files": [{"filename": "data.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    return SavedSource(path=str(folder))


def test_rows_of_many_batches_are_counted_on(tmp_path) -> None:
    records = list(write_file(tmp_path, [[1, 2], [3], [4, 5]]).records())
    name = tmp_path.name
    assert [(record.item_id, len(record.values)) for record in records] == [
        (f"{name}_0_{row}", row + 1) for row in range(5)
    ]


def test_file_cut_between_two_batches_is_refused(tmp_path) -> None:
    """Arrow reads such a file without a complaint."""
    write_file(tmp_path, [[1, 2]])
    end_of_first_batch = (tmp_path / "data.arrow").stat().st_size - 8
    source = write_file(tmp_path, [[1, 2], [3]])
    cut = (tmp_path / "data.arrow").read_bytes()[:end_of_first_batch]
    (tmp_path / "data.arrow").write_bytes(cut)
    assert pa.ipc.open_stream(cut).read_all().num_rows == 2
    with pytest.raises(DataError, match=r"data\.arrow: ends without the mark"):
        source.units()


def test_file_without_rows_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no series"):
        write_file(tmp_path, [[]]).units()


def test_data_file_that_is_missing_or_of_another_kind_is_refused(tmp_path) -> None:
    source = save(tmp_path, utsd())
    (file,) = (tmp_path / "data").glob("*.arrow")
    file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\xff\xff\xff\xff\0\0\0\0")
    with pytest.raises(DataError, match=file.name):
        source.units()
    file.unlink()
    with pytest.raises(DataError, match=file.name):
        source.units()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "lists no data files"),
        ('{"_data_files": 5}', "lists no data files"),
        ('{"_data_files": []}', "holds no series"),
        ('{"_data_files": [{"name": "a"}]}', "lists no data files"),
        ('{"_data_files": [], "_indices_data_files": [{"filename": "a"}]}', "picked by an index"),
    ],
)
def test_state_that_makes_no_sense_is_refused(tmp_path, content, says) -> None:
    source = save(tmp_path, utsd())
    (tmp_path / "data" / "state.json").write_text(content)
    with pytest.raises(DataError, match=says):
        source.units()


def test_data_set_without_rows_or_values_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="holds no series"):
        save(tmp_path / "empty", utsd().select([])).units()
    with pytest.raises(DataError, match="no column 'target'"):
        list(save(tmp_path / "other", utsd().remove_columns("target")).records())


def test_file_outside_of_the_folder_is_never_read(tmp_path) -> None:
    source = save(tmp_path, utsd())
    state = {"_data_files": [{"filename": "../../etc/passwd"}]}
    (tmp_path / "data" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="data/passwd"):
        source.units()


def test_name_of_a_column_that_is_no_utf_8_is_refused(tmp_path) -> None:
    source = write_file(tmp_path, [[1]])
    file = tmp_path / "data.arrow"
    file.write_bytes(file.read_bytes().replace(b"target", b"t\xffrget"))
    with pytest.raises(DataError, match=r"data\.arrow: cannot be read .*utf-8"):
        source.units()


def test_folder_whose_name_is_no_utf_8_is_refused(tmp_path) -> None:
    save(tmp_path, utsd())
    (tmp_path / "data").rename(tmp_path / "d\udcff")
    with pytest.raises(ConfigError, match=r"is no UTF-8; rename it"):
        SavedSource(path=str(tmp_path / "*")).units()
