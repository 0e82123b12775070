import datetime as dt
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import HfHubHTTPError

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.sources import HubSource

LENGTHS = (50, 7, 130)


@pytest.fixture(scope="module")
def utsd() -> datasets.Dataset:
    """Rows in the columns of UTSD on the hub."""
    generator = np.random.default_rng(0)
    return datasets.Dataset.from_dict(
        {
            "item_id": [f"Energy_wind_farms_{index}" for index in range(len(LENGTHS))],
            "start": [dt.datetime(2020, 1, 1), None, dt.datetime(2021, 1, 1)],
            "end": [dt.datetime(2020, 1, 3), None, dt.datetime(2021, 2, 1)],
            "freq": ["H", "4S", "H"],
            "target": [generator.normal(size=length).astype(np.float32) for length in LENGTHS],
        }
    )


def save(utsd: datasets.Dataset, folder: Path, layout: str) -> Path:
    match layout:
        case "saved":
            utsd.save_to_disk(str(folder))
        case "saved_splits":
            datasets.DatasetDict({"train": utsd}).save_to_disk(str(folder))
        case "arrow":
            # The hub keeps one folder per data set, with files in the stream format.
            utsd.save_to_disk(str(folder / "Energy"))
            (folder / "Energy" / "state.json").unlink()
            (folder / "Energy" / "dataset_info.json").unlink()
        case "parquet":
            folder.mkdir()
            utsd.to_parquet(str(folder / "train-00000.parquet"))
    return folder


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("layout", ["saved", "saved_splits", "arrow", "parquet"])
def test_local_copy_of_utsd_gives_every_series(utsd, tmp_path, layout, streaming) -> None:
    folder = save(utsd, tmp_path / "utsd", layout)
    source = HubSource(path=str(folder), streaming=streaming, cache_dir=str(tmp_path / "cache"))
    records = list(source.records())
    assert [len(record.values) for record in records] == list(LENGTHS)
    assert {(record.domain, record.source) for record in records} == {("Energy", "wind_farms")}
    assert [record.freq for record in records] == ["h", "4s", "h"]
    assert [record.start for record in records] == [
        dt.datetime(2020, 1, 1),
        None,
        dt.datetime(2021, 1, 1),
    ]
    for record, target in zip(records, utsd["target"], strict=True):
        np.testing.assert_array_equal(record.values, np.array(target, np.float32))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple[str, str, dict]]:
    """Put a data set of three shards of two rows where the hub is; returns what is asked for."""
    files = []
    for shard in range(3):
        rows = {"target": [[float(shard), float(row)] for row in range(2)]}
        files.append(str(tmp_path / f"{shard}.parquet"))
        datasets.Dataset.from_dict(rows).to_parquet(files[-1])
    calls = []
    load = datasets.load_dataset

    def load_dataset(path: str, name: str, **options: object) -> datasets.IterableDataset:
        calls.append((path, name, options))
        return load(
            "parquet",
            data_files=files,
            split="train",
            streaming=options["streaming"],
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_set_is_asked_for_by_name(hub) -> None:
    next(HubSource(name="UTSD-1G", revision="abc").records())
    options = {"split": "train", "revision": "abc", "streaming": True, "cache_dir": None}
    assert hub
    assert all(call == ("thuml/UTSD", "UTSD-1G", options) for call in hub)


@pytest.mark.parametrize("streaming", [True, False])
def test_each_shard_on_the_hub_is_a_unit(hub, streaming) -> None:
    source = HubSource(path="owner/name", streaming=streaming)
    units = source.units()
    assert len(units) == 3
    assert not any(options["streaming"] is False for _, _, options in hub), "units() downloads"
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    records = [record for part in parts for record in part]
    assert [record.values.tolist() for record in records] == [
        [shard, row] for shard in range(3) for row in range(2)
    ]
    assert [record.item_id for record in records] == [
        f"name_{shard}_{row}" for shard in range(3) for row in range(2)
    ]
    assert any(options["streaming"] is False for _, _, options in hub) == (not streaming)


def test_unreachable_hub_is_one_line(monkeypatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"thuml/UTSD: cannot be read.*no route to host.*network"):
        list(HubSource().records())


def test_connection_lost_while_reading_is_one_line(hub, monkeypatch) -> None:
    http_error = HfHubHTTPError.__mro__[1]  # of the client under it, as from a lost connection

    def break_off(self, batch_size: int) -> None:
        raise http_error("timed out")

    source = HubSource(path="owner/name")
    units = source.units()
    monkeypatch.setattr(datasets.IterableDataset, "iter", break_off)
    with pytest.raises(DataError, match=r"owner/name: cannot be read.*timed out.*network"):
        list(source.read(units[0]))


def test_wrong_folder_or_split_is_named(utsd, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        HubSource(path=str(tmp_path / "nowhere")).files()
    with pytest.raises(ConfigError, match=r"no \.arrow or \.parquet files"):
        HubSource(path=str(tmp_path)).files()
    folder = save(utsd, tmp_path / "utsd", "saved_splits")
    with pytest.raises(ConfigError, match="has the splits train, got test"):
        list(HubSource(path=str(folder), split="test").records())


def write_rows(file: Path, targets: list, form: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"target": targets, "past_feat_dynamic_real": [[9.0]] * len(targets)})
    if form == "parquet":
        pq.write_table(table, file)
        return
    make = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with make(str(file), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_each_file_is_a_unit_with_the_data_set_of_its_folder(tmp_path, form) -> None:
    suffix = "parquet" if form == "parquet" else "arrow"
    root = tmp_path / "lotsa"
    # As in LOTSA: a folder for each data set, series of several variates in some.
    write_rows(root / "wind" / f"data-00000-of-00001.{suffix}", [[1.0, 2.0], [3.0]], form)
    write_rows(root / "weather" / f"data-00000-of-00001.{suffix}", [[[4.0], [5.0]]], form)
    write_rows(root / "data" / f"train-0.{suffix}", [[6.0]], form)
    (root / "wind" / f"cache-12345.{suffix}").write_bytes(b"what datasets computed")
    source = HubSource(path=str(root), cache_dir=str(tmp_path / "cache"))
    units = source.units()
    assert [Path(unit.file).parent.name for unit in units] == ["data", "weather", "wind"]
    parts = [list(source.read(unit)) for unit in reversed(units)][::-1]
    found = [(r.source, r.item_id, r.variate, r.values.tolist()) for part in parts for r in part]
    assert found == [
        ("lotsa", "lotsa_data_train-0_0", 0, [6.0]),
        ("weather", "lotsa_weather_data-00000-of-00001_0", 0, [4.0]),
        ("weather", "lotsa_weather_data-00000-of-00001_0", 1, [5.0]),
        ("wind", "lotsa_wind_data-00000-of-00001_0", 0, [1.0, 2.0]),
        ("wind", "lotsa_wind_data-00000-of-00001_1", 0, [3.0]),
    ]
    assert not (tmp_path / "cache").exists()


def test_local_files_of_two_kinds_are_refused(tmp_path) -> None:
    write_rows(tmp_path / "a.arrow", [[1.0]], "file")
    write_rows(tmp_path / "a.parquet", [[1.0]], "parquet")
    with pytest.raises(ConfigError, match=r"mixes \.arrow and \.parquet"):
        HubSource(path=str(tmp_path)).units()


def test_stream_that_lost_its_last_batch_is_refused(tmp_path) -> None:
    lengths = []
    for count in (1, 2):
        batch = pa.record_batch({"target": [[1.0]]})
        with pa.ipc.new_stream(str(tmp_path / "data.arrow"), batch.schema) as writer:
            for _ in range(count):
                writer.write_batch(batch)
        lengths.append((tmp_path / "data.arrow").stat().st_size)
    with (tmp_path / "data.arrow").open("r+b") as file:
        file.truncate(lengths[0] - 8)  # the first batch is whole, and nothing follows
    assert pa.ipc.open_stream(str(tmp_path / "data.arrow")).read_all().num_rows == 1
    with pytest.raises(DataError, match=r"data\.arrow: ends without the mark"):
        HubSource(path=str(tmp_path)).units()


@pytest.mark.parametrize("middle", [1000, -1])
def test_offsets_beside_the_values_are_refused(tmp_path, middle) -> None:
    offsets = pa.py_buffer(np.array([0, middle, 4], np.int32))
    kind = pa.list_(pa.float32())
    target = pa.Array.from_buffers(
        kind, 2, [None, offsets], children=[pa.array([1, 2, 3, 4], pa.float32())]
    )
    table = pa.table({"target": target})
    with pa.ipc.new_file(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match=r"data\.arrow: cannot be read as Arrow .*[Oo]ffset"):
        list(HubSource(path=str(tmp_path)).records())


def test_mapped_file_is_not_copied_to_memory(tmp_path) -> None:
    values = np.random.default_rng(0).normal(size=(1024, 4096)).astype(np.float32)  # 16 MiB
    table = pa.table({"target": list(values)})
    with pa.ipc.new_stream(str(tmp_path / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    source = HubSource(path=str(tmp_path))
    peaks = [pa.total_allocated_bytes() - before for _ in source.records()]
    assert len(peaks) == 1024
    assert max(peaks) < values.nbytes / 8
