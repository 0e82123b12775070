"""What is read from tables of anomaly detection, and what is refused with which names."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.anomaly_data import AnomalyData, labelled_in_train, read_anomaly_data

ANOMALY = Path(__file__).resolve().parents[4] / "shared/data/tasks/anomaly"


def split_table() -> pd.DataFrame:
    """Two machines, the second of which stands first in time; train rows are unlabelled."""
    return pd.DataFrame(
        {
            "entity": ["b"] * 5 + ["a"] * 4,
            "split": ["train", "train", "test", "test", "test", "train", "train", "test", "test"],
            "f0": [1.0, 2.0, 3.0, np.nan, 5.0, 6.0, 7.0, 8.0, 9.0],
            "f1": [0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0],
            "label": [np.nan, np.nan, 0, 1, 0, np.nan, np.nan, 0, 0],
        }
    )


def series_table(rows: int = 20) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "series": ["s"] * rows,
            "timestamp": pd.date_range("2024-01-01", periods=rows, freq="5min"),
            "value": np.arange(rows, dtype=np.float32),
            "window_label": [0.0] * rows,
            "point_label": [0.0] * rows,
        }
    )
    frame.loc[frame.index.isin([0, 1, 10, 11]), "window_label"] = 1.0
    frame.loc[frame.index == 10, "point_label"] = 1.0
    return frame


def written(frame: pd.DataFrame, folder: Path, suffix: str = ".parquet") -> Path:
    path = folder / f"watched{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_split_column_parts_each_entity(tmp_path: Path, suffix: str) -> None:
    data = read_anomaly_data(written(split_table(), tmp_path, suffix))
    assert data.variates == ("f0", "f1"), "zeros and ones are a variate unless called a label"
    first, second = data.entities
    assert (first.name, second.name) == ("b", "a"), "in the order of the file"
    assert first.train_LC.dtype == np.float32
    np.testing.assert_array_equal(first.train_LC, [[1, 0], [2, 1]])
    np.testing.assert_array_equal(first.test_LC, [[3, 0], [np.nan, 1], [5, 0]])
    assert first.train_is_anomaly_L is None
    assert first.test_is_anomaly_L.dtype == bool
    assert first.test_is_anomaly_L.tolist() == [False, True, False]
    np.testing.assert_array_equal(second.test_LC[:, 0], [8, 9])
    assert not second.test_is_anomaly_L.any(), "an entity without an anomaly is kept"


def test_rows_of_interleaved_entities_are_gathered(tmp_path: Path) -> None:
    frame = split_table().iloc[[0, 5, 1, 6, 2, 7, 3, 8, 4]]
    data = read_anomaly_data(written(frame, tmp_path))
    np.testing.assert_array_equal(data.entities[0].test_LC[:, 0], [3, np.nan, 5])
    np.testing.assert_array_equal(data.entities[1].train_LC[:, 0], [6, 7])


def test_first_share_trains_without_a_split(tmp_path: Path) -> None:
    data = read_anomaly_data(written(series_table(), tmp_path))
    (entity,) = data.entities
    assert data.variates == ("value",), "the other label and the time are no variates"
    np.testing.assert_array_equal(entity.train_LC[:, 0], [0, 1, 2])  # 15 % of 20
    assert entity.train_is_anomaly_L is not None
    assert entity.train_is_anomaly_L.tolist() == [True, True, False]
    assert entity.test_is_anomaly_L.sum() == 2, "windows are the default of NAB"
    assert labelled_in_train(data) == 2


def test_point_labels_can_be_chosen(tmp_path: Path) -> None:
    path = written(series_table(), tmp_path)
    data = read_anomaly_data(path, label_column="point_label", train_share=0.5)
    assert data.variates == ("value",)
    assert data.entities[0].train_LC.shape == (10, 1)
    assert data.entities[0].test_is_anomaly_L.tolist() == [True] + [False] * 9
    assert labelled_in_train(data) == 0


def test_share_is_of_each_series_and_rounds_down_exactly(tmp_path: Path) -> None:
    frame = pd.concat([series_table(100), series_table(7).assign(series="short")])
    data = read_anomaly_data(written(frame, tmp_path), train_share=0.29)
    assert [len(entity.train_LC) for entity in data.entities] == [29, 2]


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_rows_are_sorted_by_time_before_the_cut(tmp_path: Path, suffix: str) -> None:
    frame = series_table().sample(frac=1, random_state=0)
    entity = read_anomaly_data(written(frame, tmp_path, suffix)).entities[0]
    np.testing.assert_array_equal(
        np.concatenate([entity.train_LC, entity.test_LC])[:, 0], np.arange(20)
    )
    assert np.flatnonzero(entity.test_is_anomaly_L).tolist() == [7, 8]


def test_rows_of_one_time_keep_their_order(tmp_path: Path) -> None:
    frame = series_table()
    frame.loc[5:8, "timestamp"] = frame.loc[5, "timestamp"]
    entity = read_anomaly_data(written(frame, tmp_path)).entities[0]
    np.testing.assert_array_equal(entity.test_LC[:, 0], np.arange(3, 20))


def test_counted_steps_order_rows_and_are_no_variate(tmp_path: Path) -> None:
    frame = series_table()
    frame["timestamp"] = np.arange(20)[::-1]
    data = read_anomaly_data(written(frame, tmp_path))
    assert data.variates == ("value",)
    np.testing.assert_array_equal(data.entities[0].train_LC[:, 0], [19, 18, 17])


def test_table_without_entities_is_one_named_after_the_file(tmp_path: Path) -> None:
    frame = series_table().drop(columns=["series", "timestamp", "point_label"])
    frame["is_attack"] = frame.pop("window_label").astype(bool)
    data = read_anomaly_data(written(frame, tmp_path), label_column="is_attack")
    assert [entity.name for entity in data.entities] == ["watched"]
    assert data.variates == ("value",)
    assert data.entities[0].test_is_anomaly_L.sum() == 2


def test_named_columns_have_their_role(tmp_path: Path) -> None:
    frame = split_table().rename(columns={"entity": "machine", "split": "part", "f0": "minute"})
    frame["minute"] = np.arange(len(frame))[::-1]
    frame["machine"] = [2] * 5 + [1] * 4
    data = read_anomaly_data(
        written(frame, tmp_path),
        entity_column="machine",
        split_column="part",
        time_column="minute",
    )
    assert [entity.name for entity in data.entities] == ["2", "1"]
    assert data.variates == ("f1",)
    assert data.entities[0].test_is_anomaly_L.tolist() == [False, True, False]


def put(column: str, row: int, value: object):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        return frame.infer_objects()

    return change


REFUSED = {
    "no label": (
        lambda frame: frame.drop(columns="label"),
        ["label_column", "entity, split, f0, f1"],
    ),
    "label of 2": (put("label", 3, 2.0), ["'label', row 4", "2.0", "neither 0 nor 1"]),
    "label in words": (lambda frame: frame.assign(label="ok"), ["'label'", "0 or 1", "'ok'"]),
    "odd split": (put("split", 2, "val"), ["'split', row 3", "'val'", "'train' nor 'test'"]),
    "no split": (put("split", 2, None), ["'split', row 3", "empty"]),
    "no entity": (put("entity", 2, None), ["'entity', row 3", "empty"]),
    "no train rows": (lambda frame: frame.drop(index=[5, 6]), ["'a'", "2 rows", "train part"]),
    "no test rows": (lambda frame: frame.drop(index=[2, 3, 4]), ["'b'", "2 rows", "test part"]),
    "text": (
        lambda frame: frame.assign(note="x", city="y"),
        ["note (", "city (", "entity_column"],
    ),
    "no variates": (lambda frame: frame.drop(columns=["f0", "f1"]), ["no variate", "entity"]),
    "unseen variate": (lambda frame: frame.assign(f1=np.nan), ["no observed value", "f1"]),
    "unseen part": (
        lambda frame: frame.assign(f0=frame["f0"].where(frame.index < 7), f1=frame["f0"]).drop(
            columns="f1"
        ),
        ["'a'", "2 rows", "test part"],
    ),
    "infinite": (put("f0", 1, np.inf), ["'f0', row 2", "infinite"]),
    "unlabelled test row": (put("label", 3, np.nan), ["'b', row 4", "1 of 3 test rows"]),
    "half labelled train": (put("label", 1, 0.0), ["'b', row 1", "1 of 2 train rows"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_faulty_table_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, words = REFUSED[fault]
    path = written(change(split_table()), tmp_path)
    with pytest.raises(DataError) as caught:
        read_anomaly_data(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_faulty_options_are_refused(tmp_path: Path) -> None:
    split = written(split_table(), tmp_path)
    with pytest.raises(ConfigError, match=r"train_share.*'split'.*0\.3"):
        read_anomaly_data(split, train_share=0.3)
    with pytest.raises(ConfigError, match=r"entity_column.*'host'.*entity, split"):
        read_anomaly_data(split, entity_column="host")
    with pytest.raises(ConfigError, match=r"time_column.*'f0'.*label_column"):
        read_anomaly_data(split, label_column="f0", time_column="f0")
    plain = written(series_table(), tmp_path)
    with pytest.raises(ConfigError, match="between 0 and 1, got 1"):
        read_anomaly_data(plain, train_share=1)
    with pytest.raises(DataError, match=r"'s'.*20 rows.*train part.*train_share"):
        read_anomaly_data(plain, train_share=0.01)


def real(name: str) -> AnomalyData:
    path = ANOMALY / name
    if not path.exists():
        pytest.skip(f"{path} is not there: the shared data is not part of the repository")
    return read_anomaly_data(path)


@pytest.mark.parametrize(
    ("name", "rows", "train_rows", "entities", "variates"),
    [
        ("smap.parquet", 573830, 138004, 54, 25),
        ("msl.parquet", 132046, 58317, 27, 55),
        ("asd_8_servers.parquet", 103680, 69120, 8, 19),
        ("smd_6_machines.parquet", 284366, 142181, 6, 38),
    ],
)
def test_published_split_is_read_whole(name, rows, train_rows, entities, variates) -> None:
    data = real(name)
    assert (len(data.entities), len(data.variates)) == (entities, variates)
    assert sum(len(entity.train_LC) for entity in data.entities) == train_rows
    assert sum(len(entity.test_LC) for entity in data.entities) == rows - train_rows
    assert all(entity.train_is_anomaly_L is None for entity in data.entities)
    assert any(entity.test_is_anomaly_L.any() for entity in data.entities)


@pytest.mark.parametrize(
    ("name", "rows", "entities", "anomalies"),
    [("nab.parquet", 340284, 45, 30975), ("cloud_monitoring.parquet", 225445, 60, 4555)],
)
def test_published_series_are_read_whole(name, rows, entities, anomalies) -> None:
    data = real(name)
    assert (len(data.entities), data.variates) == (entities, ("value",))
    lengths = [(len(entity.train_LC), len(entity.test_LC)) for entity in data.entities]
    assert sum(train + test for train, test in lengths) == rows
    assert all(train == (train + test) * 15 // 100 for train, test in lengths)
    in_test = sum(int(entity.test_is_anomaly_L.sum()) for entity in data.entities)
    assert in_test + labelled_in_train(data) == anomalies
