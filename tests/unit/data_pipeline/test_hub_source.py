import datetime as dt
from pathlib import Path

import datasets
import numpy as np
import pytest

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


def test_hub_data_set_is_asked_for_by_name(utsd, monkeypatch) -> None:
    calls = []

    def load_dataset(path: str, name: str, **options: object) -> datasets.IterableDataset:
        calls.append((path, name, options))
        return utsd.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    records = list(HubSource(name="UTSD-1G", revision="abc").records())
    assert len(records) == len(LENGTHS)
    options = {"split": "train", "revision": "abc", "streaming": True, "cache_dir": None}
    assert calls == [("thuml/UTSD", "UTSD-1G", options)]


def test_unreachable_hub_is_one_line(monkeypatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"thuml/UTSD: cannot be read.*no route to host.*network"):
        list(HubSource().records())


def test_wrong_folder_or_split_is_named(utsd, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no folder .*nowhere"):
        HubSource(path=str(tmp_path / "nowhere")).files()
    with pytest.raises(ConfigError, match=r"no \.arrow or \.parquet files"):
        HubSource(path=str(tmp_path)).files()
    folder = save(utsd, tmp_path / "utsd", "saved_splits")
    with pytest.raises(ConfigError, match="no split 'test'; splits: train"):
        list(HubSource(path=str(folder), split="test").records())
