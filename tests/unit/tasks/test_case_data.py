"""What is read from files and arrays of labelled cases, and what is refused with which names."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tsmoe.errors import DataError
from tsmoe.tasks.case_data import UNLABELLED, cases_from_arrays, read_cases

CLASSIFICATION = Path(__file__).resolve().parents[4] / "shared/data/tasks/classification"


def case_rows() -> dict[str, list]:
    return {
        "split": ["train", "test", "train", "test"],
        "label": ["walk", "run", "run", "run"],
        "dims": [
            [[1.0, 2.0], [3.0, 4.0]],
            [[5.0, None, 6.0], [7.0, 8.0, 9.0]],
            [[10.0], [11.0]],
            [[12.0], [13.0]],
        ],
    }


def written(rows: dict[str, list], folder: Path) -> Path:
    path = folder / "cases.parquet"
    pq.write_table(pa.table(rows), path)
    return path


def test_file_is_parted_and_labels_count_along_sorted_classes(tmp_path: Path) -> None:
    data = read_cases(written(case_rows(), tmp_path))
    assert data.classes == ("run", "walk")
    assert data.train.labels.tolist() == [1, 0]
    assert data.test.labels.tolist() == [0, 0]
    assert data.train.labels.dtype == np.int64
    assert data.train.lengths.tolist() == [2, 1]
    assert data.train.num_variates == 2
    assert data.train.values[0].dtype == np.float32
    np.testing.assert_array_equal(data.train.values[0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(data.train.values[1], [[10], [11]])
    np.testing.assert_array_equal(data.test.values[0], [[5, np.nan, 6], [7, 8, 9]])


def put(column: str, row: int, value: object):
    def change(rows: dict[str, list]) -> None:
        rows[column][row] = value

    return change


REFUSED = {
    "unseen class": (
        lambda rows: rows.update(label=["walk", "fly", "run", "fly"]),
        ["test part", "'fly' (2 cases)", "run, walk"],
    ),
    "single class": (put("label", 0, "run"), ["train part", "run is the only class"]),
    "variates differ": (put("dims", 3, [[1.0]]), ["row 4 (test case)", "1 variates", "2 in"]),
    "unequal variates": (
        put("dims", 2, [[1.0], [1.0, 2.0]]),
        ["row 3 (train case)", "1, 2 steps"],
    ),
    "empty case": (put("dims", 2, []), ["row 3 (train case)", "no steps"]),
    "no case": (put("dims", 0, None), ["row 1 (train case)", "no steps"]),
    "no steps": (put("dims", 2, [[], []]), ["row 3 (train case)", "no steps"]),
    "nothing seen": (put("dims", 1, [[None], [None]]), ["row 2 (test case)", "all values are NaN"]),
    "infinite": (
        put("dims", 1, [[1.0, 2.0], [1.0, -np.inf]]),
        ["row 2 (test case), variate 1, step 1", "infinite"],
    ),
    "beyond float32": (put("dims", 2, [[1e300], [1.0]]), ["row 3", "variate 0", "float32"]),
    "odd split": (put("split", 1, "val"), ["'split', row 2", "'val'"]),
    "no test": (lambda rows: rows.update(split=["train"] * 4), ["no test cases among 4"]),
    "no train": (lambda rows: rows.update(split=["test"] * 4), ["no train cases among 4"]),
    "no label": (put("label", 1, None), ["'label', row 2", "empty"]),
    "missing columns": (
        lambda rows: [rows.pop("split"), rows.pop("dims")],
        ["no column split, dims", "columns there: label"],
    ),
    "flat dims": (lambda rows: rows.update(dims=[1.0] * 4), ["'dims'", "double"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_faulty_file_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, words = REFUSED[fault]
    rows = case_rows()
    change(rows)
    path = written(rows, tmp_path)
    with pytest.raises(DataError) as caught:
        read_cases(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cases.csv"
    path.write_text("split,label,dims\n")
    with pytest.raises(DataError, match=r"cases\.csv.*Parquet"):
        read_cases(path)


@pytest.mark.parametrize("wrap", [np.asarray, list, lambda X_BCL: X_BCL.tolist()])
def test_arrays_and_lists_give_the_same_cases(wrap) -> None:
    X_BCL = np.random.default_rng(0).normal(size=(4, 3, 5))
    cases, classes = cases_from_arrays(wrap(X_BCL), [3, 1, 3, 2])
    assert classes.tolist() == [1, 2, 3]
    assert cases.labels.tolist() == [2, 0, 2, 1]
    assert cases.labels.dtype == np.int64
    np.testing.assert_array_equal(np.stack(cases.values), X_BCL.astype(np.float32))


@pytest.mark.parametrize("wrap", [np.asarray, list, pd.DataFrame])
def test_flat_arrays_are_one_variate(wrap) -> None:
    X_BL = np.arange(12.0).reshape(3, 4)
    cases, classes = cases_from_arrays(wrap(X_BL))
    assert [values_CL.shape for values_CL in cases.values] == [(1, 4)] * 3
    np.testing.assert_array_equal(cases.values[1], [[4, 5, 6, 7]])
    assert cases.labels.tolist() == [UNLABELLED] * 3
    assert classes.size == 0


def test_lengths_of_cases_may_differ() -> None:
    arrays = np.empty(2, dtype=object)
    arrays[:] = [np.ones((2, 3)), np.zeros((2, 7))]
    for X in (arrays, list(arrays)):
        cases, _ = cases_from_arrays(X, ["a", "b"])
        assert cases.lengths.tolist() == [3, 7]


def test_given_classes_number_the_labels() -> None:
    cases, classes = cases_from_arrays(np.ones((2, 4)), ["b", "b"], classes=np.array(["a", "b"]))
    assert cases.labels.tolist() == [1, 1]
    assert classes.tolist() == ["a", "b"]


TWO = np.ones((2, 1, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((TWO, ["c", "c"], ["a", "b"]), ["'c' (2 cases)", "a, b"]),
        ((TWO, ["c", "c"]), ["y", "c is the only class"]),
        ((TWO, ["a", "b", "c"]), ["2 cases", "(3,)"]),
        ((TWO, ["a", None]), ["y, case 1", "None"]),
        ((TWO, [0.0, np.nan]), ["y, case 1", "nan"]),
        ((np.ones(4),), ["shape (4,)"]),
        ((np.ones((1, 1, 1, 1)),), ["shape (1, 1, 1, 1)"]),
        (([],), ["no cases"]),
        ((np.ones((0, 1, 4)),), ["no cases"]),
        (([np.ones((2, 3)), np.ones((1, 3))],), ["X, case 1", "1 variates, but 2"]),
        (([[[1.0, 2.0], [1.0]]],), ["X, case 0", "one length"]),
        (([np.ones((1, 3)), [["x", "y", "z"]]],), ["X, case 1", "numbers"]),
        (([np.ones((1, 3)), np.ones((1, 0))],), ["X, case 1", "no steps"]),
        (([np.ones((1, 3)), np.full((1, 3), np.nan)],), ["X, case 1", "all values are NaN"]),
        (([np.ones((1, 3)), np.full((1, 3), 1e300)],), ["X, case 1", "variate 0", "infinite"]),
    ],
)
def test_faulty_arrays_are_refused_by_name(arguments, words) -> None:
    with pytest.raises(DataError) as caught:
        cases_from_arrays(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("name", "train", "test", "variates", "shortest", "longest", "classes"),
    [
        ("ACSF1", 100, 100, 1, 1460, 1460, 10),
        ("ItalyPowerDemand", 67, 1029, 1, 24, 24, 2),
        ("BasicMotions", 40, 40, 6, 100, 100, 4),
        ("Epilepsy", 137, 138, 3, 206, 206, 4),
        ("GunPoint", 50, 150, 1, 150, 150, 2),
        ("JapaneseVowels", 270, 370, 12, 7, 29, 9),
        ("PickupGestureWiimoteZ", 50, 50, 1, 29, 361, 10),
        ("ArrowHead", 36, 175, 1, 251, 251, 3),
        ("OSULeaf", 200, 242, 1, 427, 427, 6),
    ],
)
def test_published_cases_are_read_whole(
    name, train, test, variates, shortest, longest, classes
) -> None:
    path = CLASSIFICATION / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there: the shared data is not part of the repository")
    data = read_cases(path)
    assert (len(data.train.values), len(data.test.values)) == (train, test)
    assert data.train.num_variates == data.test.num_variates == variates
    lengths = np.concatenate([data.train.lengths, data.test.lengths])
    assert (lengths.min(), lengths.max()) == (shortest, longest)
    assert len(data.classes) == classes
    assert set(data.test.labels) <= set(data.train.labels) == set(range(classes))
