"""Reading labelled series for anomaly detection: a train and a test part for each entity.

A file is a table, Parquet or CSV, with one row per entity and time; an entity is what was watched:
a machine, a channel, a metric. Whatever cannot be read without guessing is refused in one line.

L rows of a part   C variates
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.table import first_text, is_numeric
from data_pipeline.table_file import read_columns
from data_pipeline.time_column import TIME_NAMES, parse_times, pick_time_column
from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.task_file import listed, read_is_test, texts

ENTITY_NAMES = ("entity", "series")
"""What the column of entities is called, best first."""
SPLIT_NAMES = ("split",)
LABEL_NAMES = ("label", "window_label", "point_label")
"""What label columns are called, best first; none of them is ever a variate."""

DEFAULT_TRAIN_SHARE = 0.15
"""Share of an entity's rows that trains where the file does not say.

Source: the probationary period of the Numenta Anomaly Benchmark (arXiv 1510.03336). Departure:
NAB's own is 750 rows at most, here long series give the same share.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Entity:
    """What was watched as one: its rows in the order of time."""

    name: str
    train_LC: np.ndarray
    """float32; NaN where not observed."""
    train_is_anomaly_L: np.ndarray | None
    """bool; None if the train part is unlabelled."""
    test_LC: np.ndarray
    """float32; NaN where not observed."""
    test_is_anomaly_L: np.ndarray
    """bool; may be False throughout, such entities count for thresholds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AnomalyData:
    """The entities of a file, in the order in which they appear there."""

    path: str
    variates: tuple[str, ...]
    entities: tuple[Entity, ...]
    entity_column: str | None = None
    """None where all rows are of one entity."""
    time_column: str | None = None
    """What rows were sorted by; None if they are taken as they stand."""


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Which column of the table is what."""

    entity: str | None
    label: str
    split: str | None
    time: str | None
    variates: tuple[str, ...]


def read_anomaly_data(
    path: str | Path,
    *,
    entity_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    time_column: str | None = None,
    train_share: float | None = None,
) -> AnomalyData:
    """Read a table of entities with anomaly labels.

    Columns that are not named are found by `ENTITY_NAMES`, `LABEL_NAMES`, `SPLIT_NAMES` and, for
    the time, as in `read_table`; a table without entities is one, named after the file. All other
    columns are variates. Rows are sorted by time where there is a time; rows of the same time
    keep their order.

    Args:
        path: `.parquet`, `.pq`, or anything else as CSV.
        label_column: 1 for rows that are anomalous, 0 for others; empty rows are unlabelled, which
            an entity's train part may be as a whole.
        split_column: says train or test in each row.
        time_column: dates, or numbers that rise with time.
        train_share: share of each entity's rows, the first ones, that train; for files without a
            split, `DEFAULT_TRAIN_SHARE` if not given.

    Raises:
        ConfigError: if an option names a column that is not there or has another role, or the
            share is given beside a split or is not between 0 and 1.
        DataError: for everything that is wrong with the file.
    """
    path = Path(path)
    table = read_columns(path)
    columns = _find_columns(
        table, path, entity=entity_column, label=label_column, split=split_column, time=time_column
    )
    _check_share(train_share, columns.split, path)
    values_LC = _read_values(table, columns.variates, path)
    labels_L = _read_labels(table, columns.label, path)
    names, entity_L = read_entities(table, columns.entity, path)
    order_L = np.arange(table.num_rows)
    if columns.time is not None:
        order_L = np.argsort(read_time(table, columns.time, path), kind="stable")
    order_L = order_L[np.argsort(entity_L[order_L], kind="stable")]
    if columns.split is None:
        share = DEFAULT_TRAIN_SHARE if train_share is None else train_share
        is_test_L = _first_rows_train(order_L, entity_L, share)
    else:
        where = f"{path}, column {columns.split!r}"
        is_test_L = read_is_test(table.column(columns.split), where)

    starts = np.searchsorted(entity_L[order_L], np.arange(len(names) + 1))
    entities = []
    for index, name in enumerate(names):
        rows = order_L[starts[index] : starts[index + 1]]
        where = f"{path}, entity {name!r}"
        entities.append(_cut_entity(name, values_LC, labels_L, rows, is_test_L, where=where))
    return AnomalyData(
        path=str(path),
        variates=columns.variates,
        entities=tuple(entities),
        entity_column=columns.entity,
        time_column=columns.time,
    )


def labelled_in_train(data: AnomalyData) -> int:
    """Count the rows of train parts that are labelled as anomalous, and should not be learned."""
    return sum(
        int(entity.train_is_anomaly_L.sum())
        for entity in data.entities
        if entity.train_is_anomaly_L is not None
    )


def _find_columns(
    table: pa.Table,
    path: Path,
    *,
    entity: str | None,
    label: str | None,
    split: str | None,
    time: str | None,
) -> _Columns:
    names = table.column_names
    options = {
        "entity_column": entity,
        "label_column": label,
        "split_column": split,
        "time_column": time,
    }
    owner_of: dict[str, str] = {}
    for option, name in options.items():
        if name is None:
            continue
        if name not in names:
            raise ConfigError(
                f"{option}: {path} has no column {name!r}; columns there: {listed(names)}"
            )
        if name in owner_of:
            raise ConfigError(f"{option}: {name!r} is already the {owner_of[name]}; name another")
        owner_of[name] = option
    free = [name for name in names if name not in owner_of]
    label = label or first_of(LABEL_NAMES, free)
    if label is None:
        raise DataError(
            f"{path}: no label column (looked for {listed(LABEL_NAMES)}); columns there: "
            f"{listed(names)}; name the one that is 1 for anomalous rows by label_column (in "
            "settings tasks.NAME.label_column)"
        )
    entity = entity or first_of(ENTITY_NAMES, free)
    split = split or first_of(SPLIT_NAMES, free)
    taken = {entity, label, split, *LABEL_NAMES}
    rest = [name for name in names if name not in taken]
    time = time or find_time(table, rest, path)
    variates = tuple(name for name in rest if name != time)
    odd = [name for name in variates if not is_numeric(table.field(name).type)]
    if odd:
        raise DataError(
            f"{path}: columns of no numbers and no known role: "
            f"{listed([f'{name} ({table.field(name).type})' for name in odd])}; name their role "
            f"(entity_column, split_column, time_column) or leave them out of the file"
        )
    if not variates:
        raise DataError(
            f"{path}: no variate, a column of numbers beside entity, split, time and labels; "
            f"columns there: {listed(names)}"
        )
    return _Columns(entity=entity, label=label, split=split, time=time, variates=variates)


def find_time(table: pa.Table, names: list[str], path: Path) -> str | None:
    """Name the column among some that rows are sorted by; None if there is none."""
    if not names:
        return None
    found = pick_time_column(table.select(names), path, time_column=None)
    if found is not None:
        return found
    # Steps counted from 0 are no epochs, yet they order the rows.
    usual = [name for name in names if name.lower() in TIME_NAMES]
    return next((name for name in usual if is_numeric(table.field(name).type)), None)


def first_of(wanted: tuple[str, ...], names: list[str]) -> str | None:
    """Return the best of some usual names that is there."""
    return next((name for name in wanted if name in names), None)


def _check_share(train_share: float | None, split: str | None, path: Path) -> None:
    if train_share is None:
        return
    if split is not None:
        raise ConfigError(
            f"train_share: {path} has the split column {split!r}, which says what trains; leave "
            f"train_share ({train_share}) out"
        )
    if not 0 < train_share < 1:
        raise ConfigError(f"train_share must lie between 0 and 1, got {train_share}")


def read_numbers(table: pa.Table, variates: Sequence[str], path: Path) -> np.ndarray:
    """Return the columns of variates as float32; NaN where not observed.

    Raises:
        DataError: naming the first cell that is not a finite number.
    """
    values_LC = np.empty((table.num_rows, len(variates)), np.float32)
    for place, name in enumerate(variates):
        column = table.column(name)
        if not is_numeric(column.type):
            row, value = first_text(column)
            raise DataError(
                f"{path}, column {name!r}, row {row}: {value!r} is not a number; mend the cell, or "
                "leave it empty"
            )
        values_LC[:, place] = column.cast(pa.float32(), safe=False).to_numpy()
    is_infinite_LC = np.isinf(values_LC)
    if is_infinite_LC.any():
        row, place = np.argwhere(is_infinite_LC)[0]
        name = variates[place]
        raise DataError(
            f"{path}, column {name!r}, row {row + 1}: {table.column(name)[int(row)].as_py()} is "
            f"infinite or beyond float32; leave the cell empty if the value is missing"
        )
    return values_LC


def _read_values(table: pa.Table, variates: tuple[str, ...], path: Path) -> np.ndarray:
    values_LC = read_numbers(table, variates, path)
    is_unseen_C = np.isnan(values_LC).all(axis=0)
    unseen = [variates[index] for index in np.flatnonzero(is_unseen_C)]
    if unseen:
        raise DataError(
            f"{path}: no observed value in any of the {len(values_LC)} rows of {listed(unseen)}; "
            f"leave these columns out"
        )
    return values_LC


def _read_labels(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return the labels as float32: 0, 1, or NaN where unlabelled."""
    column = table.column(name)
    where = f"{path}, column {name!r}"
    if not is_numeric(column.type):
        example = next((value for value in column.to_pylist() if value is not None), None)
        raise DataError(f"{where}: labels must be 0 or 1, got {column.type} such as {example!r}")
    labels_L = column.cast(pa.float32(), safe=False).to_numpy()
    odd = np.flatnonzero(~np.isin(labels_L, (0, 1)) & ~np.isnan(labels_L))
    if odd.size:
        row = int(odd[0])
        raise DataError(
            f"{where}, row {row + 1}: the label {column[row].as_py()} is neither 0 nor 1 "
            f"(rows that are neither: {odd.size}); write 1 for anomalous rows, or name another "
            f"label_column"
        )
    return labels_L


def read_entities(
    table: pa.Table, name: str | None, path: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names in the order in which they appear, and the number of each row's one."""
    if name is None:
        return (path.stem,), np.zeros(table.num_rows, np.int64)
    coded = pa.array(texts(table.column(name), f"{path}, column {name!r}")).dictionary_encode()
    return tuple(coded.dictionary.to_pylist()), coded.indices.to_numpy().astype(np.int64)


def read_time(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """Return what the rows are sorted by: times, or the numbers themselves."""
    column = table.column(name)
    where = f"{path}, column {name!r}"
    if not is_numeric(column.type):
        return parse_times(column, where)[0]
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0]) + 1
        raise DataError(f"{where}, row {row}: the time is empty; every row needs one")
    return column.to_numpy()


def _first_rows_train(order_L: np.ndarray, entity_L: np.ndarray, share: float) -> np.ndarray:
    """Give the first rows of each entity to the train part.

    Args:
        order_L: row numbers, the entities one after another and each in the order of time.
    """
    sorted_L = entity_L[order_L]
    counts = np.bincount(sorted_L)
    places_L = np.arange(len(sorted_L)) - np.repeat(np.cumsum(counts) - counts, counts)
    # Rounded first: 0.29 * 100 is 28.999999999999996.
    train_rows = np.array([math.floor(round(share * count, 6)) for count in counts.tolist()])
    is_test_L = np.empty(len(entity_L), bool)
    is_test_L[order_L] = places_L >= train_rows[sorted_L]
    return is_test_L


def _cut_entity(
    name: str,
    values_LC: np.ndarray,
    labels_L: np.ndarray,
    rows: np.ndarray,
    is_test_L: np.ndarray,
    *,
    where: str,
) -> Entity:
    """Cut the parts of one entity, whose rows come in the order of time."""
    train, test = rows[~is_test_L[rows]], rows[is_test_L[rows]]
    for part, own in (("train", train), ("test", test)):
        if not own.size:
            raise DataError(
                f"{where}: none of its {len(rows)} rows is in the {part} part; give rows for it, "
                f"leave the entity out, or change train_share where there is no split column"
            )
        if not np.isfinite(values_LC[own]).any():
            raise DataError(
                f"{where}: nothing is observed in the {own.size} rows of its {part} part; leave "
                f"the entity out"
            )
    unlabelled = test[np.isnan(labels_L[test])]
    if unlabelled.size:
        raise DataError(
            f"{where}, row {unlabelled[0] + 1}: {unlabelled.size} of {test.size} test rows have no "
            f"label; label all of them, or leave them out"
        )
    is_unlabelled_L = np.isnan(labels_L[train])
    if is_unlabelled_L.any() and not is_unlabelled_L.all():
        raise DataError(
            f"{where}, row {train[is_unlabelled_L][0] + 1}: {is_unlabelled_L.sum()} of "
            f"{train.size} train rows have no label; label all of them or none"
        )
    return Entity(
        name=name,
        train_LC=values_LC[train],
        train_is_anomaly_L=None if is_unlabelled_L.all() else labels_L[train] == 1,
        test_LC=values_LC[test],
        test_is_anomaly_L=labels_L[test] == 1,
    )
