"""Reading many univariate series of their own lengths, each with the values that follow it.

The layout is that of the corpus: one series per row. The test values come from a second file, as
in the M4 competition, or are the last points of each series.

S series   L train points of a series   Q prediction steps
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.table_file import is_parquet, read_columns
from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.task_file import float_lists, listed, require_columns, texts

COLUMNS = ("item_id", "target")

SHORTEST_SERIES = 2
"""Fewest train points of a series: the first that has a difference to scale errors by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesData:
    """Series and what follows each of them, in the order of the train file."""

    path: str
    """Of the train file."""
    names: tuple[str, ...]
    """The `item_id` of each series in the train file."""
    train: tuple[np.ndarray, ...]
    """values_L of each series, float32; NaN where not observed."""
    test_SQ: np.ndarray
    """float32, the steps right after each series; NaN where not observed."""
    freq: str | None
    """As the file writes it, the same for all series; None if it does not say."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _SeriesFile:
    path: Path
    names: list[str]
    datasets: list[str]
    """The name of the data set in each row, empty where there is none."""
    values: list[np.ndarray]
    freq: str | None


def read_series(
    train_path: str | Path,
    test_path: str | Path | None = None,
    prediction_length: int | None = None,
) -> SeriesData:
    """Read series and their test values.

    The rows of the two files are joined by `item_id`. Where no id is in both files and there is a
    column `dataset`, its text is left out of the ids first: "Finance_m4_hourly_train_H1" and
    "Finance_m4_hourly_test_H1" are parts of data sets that are named after the files.

    Args:
        train_path: Parquet with `item_id`, `target` (a list of numbers) and perhaps `freq`.
        test_path: the same for what follows the train series.
        prediction_length: without a test file, how many of the last points of each series are the
            test; with one, the length that its series must have, if given.

    Raises:
        ConfigError: if the test is not given, or another length than the test file has.
        DataError: for everything that is wrong with the files, naming the series.
    """
    if prediction_length is not None and prediction_length < 1:
        raise ConfigError(f"prediction_length must be at least 1, got {prediction_length}")
    train = _read_file(Path(train_path))
    if test_path is None:
        if prediction_length is None:
            raise ConfigError(
                "test_path or prediction_length: give the file of what follows the series, or how "
                "many of the last points of each are the test"
            )
        train_values, test_SQ = _cut_last(train, prediction_length)
        freq = train.freq
    else:
        test = _read_file(Path(test_path))
        train_values, test_SQ = train.values, _joined(train, test)
        if prediction_length is not None and test_SQ.shape[1] != prediction_length:
            raise ConfigError(
                f"prediction_length ({prediction_length}): the series of {test.path} have "
                f"{test_SQ.shape[1]} points; leave the option out or give that number"
            )
        if None not in (train.freq, test.freq) and train.freq != test.freq:
            raise DataError(
                f"{test.path}: freq {test.freq!r}, but {train.freq!r} in {train.path}; give the "
                f"test file that belongs to it"
            )
        freq = train.freq or test.freq
    for name, values_L in zip(train.names, train_values, strict=True):
        _check_train(values_L, f"{train.path}, series {name!r}")
    return SeriesData(
        path=str(train.path),
        names=tuple(train.names),
        train=tuple(train_values),
        test_SQ=test_SQ,
        freq=freq,
    )


def read_histories(path: str | Path) -> tuple[list[str], list[np.ndarray]]:
    """Read series whose future nobody knows: the `item_id` of each, and its values.

    Raises:
        DataError: for everything that is wrong with the file, naming the series.
    """
    file = _read_file(Path(path))
    for name, values_L in zip(file.names, file.values, strict=True):
        if not np.isfinite(values_L).any():
            raise DataError(f"{path}, series {name!r}: nothing is observed; leave it out")
    return file.names, file.values


def _read_file(path: Path) -> _SeriesFile:
    if not is_parquet(path):
        raise DataError(f"{path}: series are read from Parquet (.parquet or .pq); convert the file")
    table = read_columns(path)
    require_columns(table, COLUMNS, path)
    names = texts(table.column("item_id"), f"{path}, column 'item_id'")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: item_id {listed(twice)} stands in several rows; keep one row per series"
        )
    values = float_lists(table.column("target"), f"{path}, column 'target'")
    for name, values_L in zip(names, values, strict=True):
        infinite = np.flatnonzero(np.isinf(values_L))
        if infinite.size:
            raise DataError(
                f"{path}, series {name!r}, point {infinite[0] + 1}: infinite or beyond float32; "
                f"write null if the value is missing"
            )
    datasets = [""] * len(names)
    if "dataset" in table.column_names:
        datasets = [name or "" for name in table.column("dataset").cast(pa.string()).to_pylist()]
    return _SeriesFile(
        path=path, names=names, datasets=datasets, values=values, freq=_read_freq(table, path)
    )


def _read_freq(table: pa.Table, path: Path) -> str | None:
    if "freq" not in table.column_names:
        return None
    freqs = table.column("freq").cast(pa.string()).unique().drop_null().to_pylist()
    if len(freqs) > 1:
        raise DataError(
            f"{path}: series of several frequencies ({listed(freqs)}); give one file for each"
        )
    return freqs[0] if freqs else None


def _cut_last(train: _SeriesFile, prediction_length: int) -> tuple[list[np.ndarray], np.ndarray]:
    needed = prediction_length + SHORTEST_SERIES
    for name, values_L in zip(train.names, train.values, strict=True):
        if len(values_L) < needed:
            raise DataError(
                f"{train.path}, series {name!r}: {len(values_L)} points, {needed} are needed for "
                f"prediction_length {prediction_length}; shorten it or leave the series out"
            )
    test_SQ = np.stack([values_L[-prediction_length:] for values_L in train.values])
    return [values_L[:-prediction_length] for values_L in train.values], test_SQ


def _joined(train: _SeriesFile, test: _SeriesFile) -> np.ndarray:
    """Return the test values in the order of the train series."""
    train_keys, test_keys = train.names, test.names
    if not set(train_keys) & set(test_keys):
        train_keys, test_keys = _keys_without_dataset(train), _keys_without_dataset(test)
    name_of_train = dict(zip(train_keys, train.names, strict=True))
    place_of_test = {key: place for place, key in enumerate(test_keys)}
    unknown = [
        test.names[place] for key, place in place_of_test.items() if key not in name_of_train
    ]
    if unknown:
        raise DataError(
            f"{test.path}: {len(unknown)} of {len(test.names)} series are not in {train.path}: "
            f"{listed(unknown)}; give the file of the same series, with the same item_id"
        )
    lacking = [name for key, name in name_of_train.items() if key not in place_of_test]
    if lacking:
        raise DataError(
            f"{test.path}: no test values for {len(lacking)} of {len(train.names)} series of "
            f"{train.path}: {listed(lacking)}; add them, or leave these series out"
        )
    lengths = [len(values_Q) for values_Q in test.values]
    most = Counter(lengths).most_common(1)[0][0]
    odd = [
        f"{name} ({length})"
        for name, length in zip(test.names, lengths, strict=True)
        if length != most
    ]
    if odd or most == 0:
        raise DataError(
            f"{test.path}: test series must have one length above 0; most have {most} points, "
            f"others: {listed(odd)}; cut them alike"
        )
    return np.stack([test.values[place_of_test[key]] for key in train_keys])


def _keys_without_dataset(file: _SeriesFile) -> list[str]:
    keys = [
        name.replace(dataset, "", 1)
        for name, dataset in zip(file.names, file.datasets, strict=True)
    ]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    return file.names if twice else keys


def _check_train(values_L: np.ndarray, where: str) -> None:
    if len(values_L) < SHORTEST_SERIES:
        raise DataError(
            f"{where}: {len(values_L)} points, at least {SHORTEST_SERIES} are needed before the "
            f"test; leave the series out"
        )
    if np.isnan(values_L).all():
        raise DataError(
            f"{where}: nothing is observed in its {len(values_L)} train points; leave it out"
        )
