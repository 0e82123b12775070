"""Reading labelled cases for classification: short series of one length or of many.

Cases come from a file with its own split, or as arrays in the way of scikit-learn. Whatever cannot
be read without guessing is refused in one line.

B cases   C variates ("dimensions" in the archives)   L steps of a case
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.table_file import is_parquet, read_columns
from tsmoe.errors import DataError
from tsmoe.tasks.task_file import (
    listed,
    nested_float_lists,
    read_is_test,
    require_columns,
    texts,
)

COLUMNS = ("split", "label", "dims")

UNLABELLED = -1
"""The label of cases that came without one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseSet:
    """Cases with the same variates and each its own length."""

    values: tuple[np.ndarray, ...]
    """values_CL of each case, float32; NaN where not observed."""
    labels: np.ndarray
    """int64, one for each case: places in the list of classes, or `UNLABELLED`."""

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each case, int64."""
        return np.array([values_CL.shape[1] for values_CL in self.values], np.int64)

    @property
    def num_variates(self) -> int:
        """Variates that every case has."""
        return self.values[0].shape[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class CaseData:
    """The two parts of a file."""

    path: str
    classes: tuple[str, ...]
    """Those of the train part, sorted as text; labels count along it."""
    train: CaseSet
    test: CaseSet


def read_cases(path: str | Path) -> CaseData:
    """Read a Parquet file with the columns `split` (train or test), `label` and `dims`.

    Args:
        path: `dims` holds one list of numbers per variate; the lengths of cases may differ.

    Raises:
        DataError: for everything that is wrong with the file, naming part and row.
    """
    path = Path(path)
    if not is_parquet(path):
        raise DataError(f"{path}: cases are read from Parquet (.parquet or .pq); convert the file")
    table = read_columns(path)
    require_columns(table, COLUMNS, path)
    is_test_B = read_is_test(table.column("split"), f"{path}, column 'split'")
    names = texts(table.column("label"), f"{path}, column 'label'")
    dims = nested_float_lists(table.column("dims"), f"{path}, column 'dims'")

    parts = {"train": np.flatnonzero(~is_test_B), "test": np.flatnonzero(is_test_B)}
    for part, rows in parts.items():
        if not rows.size:
            raise DataError(f"{path}: no {part} cases among {table.num_rows} rows; add some")
    # Both parts at once, so that they have the same variates.
    places = [
        f"{path}, row {row} ({'test' if is_test else 'train'} case)"
        for row, is_test in enumerate(is_test_B, start=1)
    ]
    values = _check_cases(
        [_stack(lists, at) for lists, at in zip(dims, places, strict=True)], places
    )
    classes = tuple(sorted({names[row] for row in parts["train"]}))
    _check_classes(classes, f"{path}, train part")
    sets = {
        part: CaseSet(
            values=tuple(values[row] for row in rows),
            labels=_number([names[row] for row in rows], classes, f"{path}, {part} part"),
        )
        for part, rows in parts.items()
    }
    return CaseData(path=str(path), classes=classes, train=sets["train"], test=sets["test"])


def read_unlabelled_cases(path: str | Path) -> CaseSet:
    """Read the column `dims` of a Parquet file; all rows are cases, and labels are ignored.

    Raises:
        DataError: for everything that is wrong with the file, naming the row.
    """
    path = Path(path)
    if not is_parquet(path):
        raise DataError(f"{path}: cases are read from Parquet (.parquet or .pq); convert the file")
    table = read_columns(path)
    require_columns(table, ("dims",), path)
    dims = nested_float_lists(table.column("dims"), f"{path}, column 'dims'")
    places = [f"{path}, row {row}" for row in range(1, len(dims) + 1)]
    values = _check_cases(
        [_stack(lists, at) for lists, at in zip(dims, places, strict=True)], places
    )
    return CaseSet(values=values, labels=np.full(len(values), UNLABELLED))


def cases_from_arrays(
    X: Any,  # an array, a data frame, or a list of arrays: what scikit-learn users have at hand
    y: Any = None,  # a sequence of class names of any sortable type
    classes: Sequence[Any] | np.ndarray | None = None,
) -> tuple[CaseSet, np.ndarray]:
    """Take cases in the way of scikit-learn.

    Args:
        X: an array (B, C, L), or (B, L) for one variate, or a list of arrays (C, L) or (L,) whose
            lengths may differ; NaN where not observed.
        y: the class of each case; without it all cases are `UNLABELLED`.
        classes: those that labels count along, as a fit returned them; the sorted ones of `y` if
            not given.

    Returns:
        cases: the cases; arrays that are float32 already are not copied.
        classes: in the type of `y`; empty if neither `y` nor `classes` was given.

    Raises:
        DataError: naming the case, counted from 0 as in the array, or the classes.
    """
    arrays = _to_arrays(X)
    if not arrays:
        raise DataError("X: no cases; give at least one")
    values = _check_cases(arrays, [f"X, case {index}" for index in range(len(arrays))])
    if y is None:
        known = np.array([] if classes is None else classes)
        return CaseSet(values=values, labels=np.full(len(values), UNLABELLED)), known
    names = np.asarray(y)
    if names.shape != (len(values),):
        raise DataError(
            f"y must hold one class for each of the {len(values)} cases of X, got an array of "
            f"shape {names.shape}"
        )
    missing = np.flatnonzero([name is None or name != name for name in names.tolist()])
    if missing.size:
        raise DataError(
            f"y, case {missing[0]}: {names[missing[0]]} is no class; leave the case out"
        )
    if classes is None:
        known = np.unique(names)
        _check_classes(known.tolist(), "y")
    else:
        known = np.asarray(classes)
    return CaseSet(values=values, labels=_number(names.tolist(), known.tolist(), "y")), known


def _to_arrays(cases: Any) -> list[np.ndarray]:
    """Cut what a user gave into one float32 array (C, L) per case, not yet checked."""
    if not isinstance(cases, (list, tuple)):
        # A data frame or a tensor: what it is as an array.
        array = np.asarray(cases)
        if array.ndim not in (2, 3) and array.dtype != object:
            raise DataError(
                f"X must be an array (cases, variates, steps) or (cases, steps), or a list of "
                f"arrays (variates, steps); got the shape {array.shape}"
            )
        cases = list(array)
    arrays = []
    for index, case in enumerate(cases):
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: refused
                array = np.asarray(case).astype(np.float32, copy=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"X, case {index}: cannot be read as an array of numbers with variates of one "
                f"length ({' '.join(str(error).split())}); pad the shorter variates with NaN"
            ) from error
        if array.ndim not in (1, 2):
            raise DataError(
                f"X, case {index}: must be an array (variates, steps) or (steps,), got the shape "
                f"{array.shape}"
            )
        arrays.append(array[None] if array.ndim == 1 else array)
    return arrays


def _stack(lists: list[np.ndarray], where: str) -> np.ndarray:
    lengths = [len(values) for values in lists]
    if not lists:
        return np.empty((0, 0), np.float32)
    if len(set(lengths)) > 1:
        raise DataError(
            f"{where}: variates of unequal length ({listed(lengths)} steps); pad the shorter ones "
            f"with NaN"
        )
    return np.stack(lists)


def _check_cases(cases: list[np.ndarray], places: list[str]) -> tuple[np.ndarray, ...]:
    """Refuse cases that hold nothing, infinite values, or other variates than the first case."""
    num_variates = cases[0].shape[0]
    for values_CL, where in zip(cases, places, strict=True):
        if values_CL.size == 0:
            raise DataError(f"{where}: no steps or no variates; leave the case out")
        if values_CL.shape[0] != num_variates:
            raise DataError(
                f"{where}: {values_CL.shape[0]} variates, but {num_variates} in the case of "
                f"{places[0]}; all cases need the same ones"
            )
        if np.isinf(values_CL).any():
            variate, step = np.argwhere(np.isinf(values_CL))[0]
            raise DataError(
                f"{where}, variate {variate}, step {step}: infinite or beyond float32; write NaN "
                f"if the value is missing"
            )
        if np.isnan(values_CL).all():
            raise DataError(f"{where}: all values are NaN; leave the case out")
    return tuple(cases)


def _check_classes(classes: Sequence[Any], where: str) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{where}: {listed(classes)} is the only class; at least two are needed to learn a "
            f"difference"
        )


def _number(names: Iterable[Any], classes: Sequence[Any], where: str) -> np.ndarray:
    """Return the place of each name among the classes; all names must be there."""
    number_of = {name: number for number, name in enumerate(classes)}
    names = list(names)
    unknown = Counter(name for name in names if name not in number_of)
    if unknown:
        counts = [f"{name!r} ({count} cases)" for name, count in unknown.items()]
        raise DataError(
            f"{where}: classes that training has not seen: {listed(counts)}; known are "
            f"{listed(classes)}; leave these cases out or train with some of them"
        )
    return np.array([number_of[name] for name in names], np.int64)
