"""Which values train and which follow, for files of many series, and what is refused."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.series_data import SeriesData, read_series

BENCHMARKS = Path(__file__).resolve().parents[4] / "shared/data/benchmarks"

TRAIN = {"item_id": ["a", "b"], "target": [[1.0, 2.0, 3.0], [4.0, None, 5.0, 6.0]]}
TEST = {"item_id": ["b", "a"], "target": [[7.0, None], [4.0, 5.0]]}


def written(folder: Path, name: str, rows: dict[str, list], **more: list) -> Path:
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({**rows, **more}), path)
    return path


def read_pair(folder: Path, train: dict[str, list], test: dict[str, list]) -> SeriesData:
    return read_series(written(folder, "train", train), written(folder, "test", test))


def test_test_values_join_the_train_series_by_id(tmp_path: Path) -> None:
    data = read_pair(tmp_path, TRAIN, TEST)
    assert data.names == ("a", "b")
    assert [values_L.dtype for values_L in data.train] == [np.float32] * 2
    np.testing.assert_array_equal(data.train[0], [1, 2, 3])
    np.testing.assert_array_equal(data.train[1], [4, np.nan, 5, 6])
    assert data.test_SQ.dtype == np.float32
    np.testing.assert_array_equal(data.test_SQ, [[4, 5], [7, np.nan]])
    assert data.freq is None


def test_last_points_are_the_test_without_a_test_file(tmp_path: Path) -> None:
    path = written(tmp_path, "train", TRAIN, freq=["H", None])
    data = read_series(path, prediction_length=1)
    np.testing.assert_array_equal(data.test_SQ, [[3], [6]])
    np.testing.assert_array_equal(data.train[0], [1, 2])
    np.testing.assert_array_equal(data.train[1], [4, np.nan, 5])
    assert data.freq == "H"


def test_name_of_the_data_set_is_no_part_of_the_joined_id(tmp_path: Path) -> None:
    train = {**TRAIN, "item_id": ["X_m_train_a", "X_m_train_b"], "dataset": ["m_train"] * 2}
    test = {**TEST, "item_id": ["X_m_test_b", "X_m_test_a"], "dataset": ["m_test"] * 2}
    data = read_pair(tmp_path, train, test)
    assert data.names == ("X_m_train_a", "X_m_train_b")
    np.testing.assert_array_equal(data.test_SQ, [[4, 5], [7, np.nan]])


REFUSED = {
    "unknown id": (
        TRAIN,
        {"item_id": ["a", "b", "z"], "target": [[1.0]] * 3},
        ["test.parquet", "1 of 3 series are not in", "z"],
    ),
    "series without test": (
        TRAIN,
        {"item_id": ["a"], "target": [[1.0]]},
        ["no test values for 1 of 2", ": b;"],
    ),
    "unequal test": (
        {"item_id": ["a", "b", "c"], "target": [[1.0, 2.0]] * 3},
        {"item_id": ["a", "b", "c"], "target": [[1.0], [1.0, 2.0], [1.0]]},
        ["most have 1 points", "b (2)"],
    ),
    "empty test": (TRAIN, {"item_id": ["a", "b"], "target": [[], []]}, ["have 0 points"]),
    "short series": (
        {"item_id": ["a", "b"], "target": [[1.0, 2.0], [1.0]]},
        TEST,
        ["train.parquet, series 'b'", "1 points", "at least 2"],
    ),
    "series of no values": (
        {"item_id": ["a", "b"], "target": [[1.0, 2.0], [None, None]]},
        TEST,
        ["train.parquet, series 'b'", "nothing is observed", "2 train points"],
    ),
    "id twice": (
        {"item_id": ["a", "a"], "target": [[1.0, 2.0]] * 2},
        TEST,
        ["train.parquet: item_id a stands in several rows"],
    ),
    "no id": ({"item_id": ["a", None], "target": [[1.0, 2.0]] * 2}, TEST, ["row 2", "empty"]),
    "missing column": ({"item_id": ["a", "b"]}, TEST, ["no column target", "there: item_id"]),
    "numbers for lists": ({"item_id": ["a"], "target": [1.0]}, TEST, ["'target'", "double"]),
    "infinite": (
        {"item_id": ["a", "b"], "target": [[1.0, 2.0], [1.0, np.inf]]},
        TEST,
        ["series 'b', point 2", "infinite"],
    ),
    "several frequencies": ({**TRAIN, "freq": ["H", "D"]}, TEST, ["H, D", "one file for each"]),
    "other frequency": (
        {**TRAIN, "freq": ["H", "H"]},
        {**TEST, "freq": ["D", "D"]},
        ["test.parquet: freq 'D', but 'H'"],
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_faulty_files_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    train, test, words = REFUSED[fault]
    with pytest.raises(DataError) as caught:
        read_pair(tmp_path, train, test)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_series_too_short_to_be_cut_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "train", TRAIN)
    with pytest.raises(DataError, match=r"series 'a': 3 points, 4 are needed.*length 2"):
        read_series(path, prediction_length=2)


def test_faulty_options_are_refused(tmp_path: Path) -> None:
    train, test = written(tmp_path, "train", TRAIN), written(tmp_path, "test", TEST)
    with pytest.raises(ConfigError, match="test_path or prediction_length"):
        read_series(train)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        read_series(train, prediction_length=0)
    with pytest.raises(ConfigError, match=r"prediction_length \(3\).*2 points"):
        read_series(train, test, prediction_length=3)
    assert read_series(train, test, prediction_length=2).test_SQ.shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "series", "points", "shortest", "longest", "prediction_length", "freq"),
    [("m4_hourly", 414, 353500, 700, 960, 48, "H")],
)
def test_published_series_and_what_follows_them_are_read_whole(
    name, series, points, shortest, longest, prediction_length, freq
) -> None:
    train, test = BENCHMARKS / f"{name}_train.parquet", BENCHMARKS / f"{name}_test.parquet"
    if not (train.exists() and test.exists()):
        pytest.skip(f"{train} is not there: the shared data is not part of the repository")
    data = read_series(train, test)
    lengths = [len(values_L) for values_L in data.train]
    assert (len(lengths), sum(lengths)) == (series, points)
    assert (min(lengths), max(lengths)) == (shortest, longest)
    assert data.test_SQ.shape == (series, prediction_length)
    assert data.freq == freq
    # What follows a series is near to it: a wrong join would be far off.
    last_day_S = np.array([np.nanmean(values_L[-24:]) for values_L in data.train])
    next_day_S = np.nanmean(data.test_SQ[:, :24], axis=1)
    assert np.median(np.abs(next_day_S / last_day_S - 1)) < 0.1
