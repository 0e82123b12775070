"""What a package of tasks makes of rows, tables, cases and series that nobody has labelled.

Shapes: B cases, C variates, L rows, Q prediction steps, S series, Y classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from data_pipeline.table import Table, read_table
from data_pipeline.table_file import read_columns
from data_pipeline.time_column import parse_times
from tsmoe.errors import CheckpointError, ConfigError, DataError
from tsmoe.tasks.anomaly import reconstruction_scores
from tsmoe.tasks.case_data import read_unlabelled_cases
from tsmoe.tasks.classification import CaseScaler
from tsmoe.tasks.imputation import fill_rows
from tsmoe.tasks.predictor import TaskForecaster, TaskPredictor, fit_length
from tsmoe.tasks.recordings import read_recordings
from tsmoe.tasks.series import scales_of_series
from tsmoe.tasks.series_data import read_histories
from tsmoe.tasks.task_file import listed
from tsmoe.tasks.windows import bounded

logger = logging.getLogger(__name__)

ANSWERED = ("anomaly", "imputation", "classification", "series")
"""Kinds of tasks that answer here; tables are forecast by `tsmoe forecast`."""


def answer(
    predictor: TaskPredictor,
    path: str | Path,
    *,
    task: str | None = None,
    entity_column: str | None = None,
    time_column: str | None = None,
    ignores_time: bool = False,
) -> pa.Table:
    """Answer for each row, case or series of a file, scaled as the task was trained.

    Args:
        predictor: of the package.
        path: the file.
        task: its kind or name; None: the only one that answers.
        entity_column: of recordings; None: as in training. The same for what follows.
        time_column: of recordings and tables.
        ignores_time: of tables: take rows as they stand.

    Returns:
        An Arrow table: of `anomaly` the score and the flag of each row, of `imputation` the table
        without gaps, of `classification` the class and the probabilities of each case, of `series`
        the steps that follow each one.

    Raises:
        ConfigError: if the package has no such task, or several, or an option is not for it.
        CheckpointError: if its card lacks what the answer needs.
        DataError: if the file does not fit it.
    """
    name, card = _task_of(predictor, task)
    options = {"entity_column": entity_column, "time_column": time_column,
               "ignores_time": ignores_time or None}  # fmt: skip
    match card["type"]:
        case "anomaly":
            _refuse("anomaly", options, heeded=("entity_column", "time_column"))
            return _score(predictor, name, card, path, entity_column, time_column)
        case "imputation":
            _refuse("imputation", options, heeded=("time_column", "ignores_time"))
            return _fill(predictor, name, card, path, time_column, ignores_time)
        case "classification":
            _refuse("classification", options)
            return _classify(predictor, name, card, path)
        case _:
            _refuse("series", options)
            return _continue(predictor, name, path)


def _task_of(predictor: TaskPredictor, asked: str | None) -> tuple[str, Mapping[str, Any]]:
    cards = predictor.card.get("tasks", {})
    kinds = {name: _of_card(cards.get(name, {}), "type") for name in predictor.model.tasks}
    answering = [name for name, kind in kinds.items() if kind in ANSWERED]
    there = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if not answering:
        raise ConfigError(f"it has {there}; tables are forecast by tsmoe forecast")
    if asked is None and len(answering) > 1:
        raise ConfigError(f"it has {there}; name one by --task")
    name = answering[0] if asked is None else predictor.task(asked)
    if name not in answering:
        raise ConfigError(
            f"task {name} is of the kind {kinds[name]}; tables are forecast by tsmoe forecast"
        )
    return name, cards[name]


def _refuse(kind: str, options: Mapping[str, Any], *, heeded: tuple[str, ...] = ()) -> None:
    for option, value in options.items():
        if value is not None and option not in heeded:
            typed = {"ignores_time": "ignore-time"}.get(option, option.replace("_", "-"))
            raise ConfigError(
                f"--{typed} is given, but a task of the kind {kind} has no use for it"
            )


def _of_card(card: Mapping[str, Any], key: str) -> Any:  # whatever the card holds
    if card.get(key) is None:
        raise CheckpointError(
            f"the card of the package does not say {key!r} of its task; it was written by an "
            "earlier version of tsmoe: train it anew"
        )
    return card[key]


def _score(
    predictor: TaskPredictor,
    name: str,
    card: Mapping[str, Any],
    path: str | Path,
    entity_column: str | None,
    time_column: str | None,
) -> pa.Table:
    """Score each row by its reconstruction error, entity by entity."""
    entities, threshold = _of_card(card, "entities"), _of_card(card, "threshold")
    recordings = read_recordings(
        path,
        _of_card(card, "variates"),
        entity_column=entity_column or card.get("entity_column"),
        time_column=time_column or card.get("time_column"),
    )
    if "entity_column" not in card:
        _of_card(card, "entity_column")
    if entity_column is None and card["entity_column"] is None:
        scales = dict.fromkeys(recordings.entities, next(iter(entities.values())))
    else:
        scales = entities
    if strangers := [own for own in recordings.entities if own not in scales]:
        raise DataError(
            f"{path}: the package was not trained on the entities {listed(strangers)}; it knows "
            f"{listed(list(scales))}; leave the others out or train with them"
        )
    score_L = np.full(len(recordings.values_LC), np.nan)
    for own, rows in zip(recordings.entities, recordings.rows, strict=True):
        if len(rows) < predictor.context_length:
            logger.warning(
                "%s, %s: %d rows are fewer than the %d of a window; what is unusual shows only "
                "beside what is usual",
                path, own, len(rows), predictor.context_length,
            )  # fmt: skip
        mean_C, std_C = (np.array(scales[own][key], np.float64) for key in ("mean", "std"))
        score_L[rows] = reconstruction_scores(
            predictor,
            name,
            bounded((recordings.values_LC[rows] - mean_C) / std_C),
            patch_length=predictor.model.config.patch_length,
            hidden_share=_of_card(card, "hidden_share"),
        )
    # Without anything recorded there is no score, and nothing to warn of.
    return _beside(recordings.named, {"score": score_L, "is_anomaly": score_L > threshold}, path)


def _beside(
    named: Mapping[str, pa.ChunkedArray], answers: Mapping[str, Any], path: str | Path
) -> pa.Table:
    """Put answers beside the columns of the file that say what they are of."""
    if twice := [name for name in answers if name in named]:
        raise DataError(f"{path}: the column {twice[0]!r} would stand twice; rename it")
    return pa.table({**named, **{name: pa.array(values) for name, values in answers.items()}})


def _fill(
    predictor: TaskPredictor,
    name: str,
    card: Mapping[str, Any],
    path: str | Path,
    time_column: str | None,
    ignores_time: bool,
) -> pa.Table:
    """Fill what is missing of a table; whatever else the file holds stays as it is."""
    mean_C, std_C = (np.array(_of_card(card, key), np.float64) for key in ("mean", "std"))
    time_column = None if ignores_time else time_column or card.get("time_column")
    table = read_table(
        path,
        time_column=time_column,
        columns=_of_card(card, "variates"),
        columns_option="variates of the package",
        ignores_time=time_column is None,
    )
    is_missing_LC = ~np.isfinite(table.values_LC)
    if is_missing_LC.all(axis=0).any():
        empty = [table.variates[place] for place in np.flatnonzero(is_missing_LC.all(axis=0))]
        raise DataError(
            f"{path}: nothing is observed of {listed(empty)}, so there is nothing to fill it from; "
            "give rows with values"
        )
    _warn_of_long_gaps(table, is_missing_LC, predictor.context_length)
    scaled_LC = bounded((table.values_LC - mean_C) / std_C)
    filled_LC = fill_rows(predictor, name, scaled_LC).astype(np.float64) * std_C + mean_C
    found = _on_grid(read_columns(Path(path)), table)
    for place, own in enumerate(table.variates):
        is_missing_L = is_missing_LC[:, place]
        if is_missing_L.any():
            column = found.column(own)
            kind = column.type if pa.types.is_floating(column.type) else pa.float64()
            filled = pa.array(filled_LC[:, place]).cast(kind)
            whole = pc.if_else(pa.array(is_missing_L), filled, column.cast(kind, safe=False))
            found = found.set_column(found.schema.get_field_index(own), own, whole)
    return found


def _on_grid(raw: pa.Table, table: Table) -> pa.Table:
    """Return the file with rows for the times that it leaves out, empty but for the time."""
    # Without what pandas wrote of an index, which is a column like others here.
    raw = raw.replace_schema_metadata(None)
    if table.timestamps is None or table.time_column is None or len(table.timestamps) == len(raw):
        return raw
    name, grid_L = table.time_column, table.timestamps
    column = raw.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
        raw = raw.set_column(raw.schema.get_field_index(name), name, column)
    stamps, has_zone = parse_times(column, f"{table.path}, column {name!r}")
    places = np.searchsorted(grid_L, stamps)
    logger.info(
        "%s: %d rows of times that the file leaves out were added",
        table.path, len(grid_L) - len(raw),
    )  # fmt: skip
    is_added_L = np.ones(len(grid_L), bool)
    is_added_L[places] = False
    row_L = np.zeros(len(grid_L), np.int64)
    row_L[places] = np.arange(len(raw))
    found = raw.take(pa.array(row_L, mask=is_added_L))
    times = pc.if_else(
        pa.array(is_added_L), _times_like(column, grid_L, stamps, has_zone), found.column(name)
    )
    return found.set_column(found.schema.get_field_index(name), name, times)


def _times_like(
    column: pa.ChunkedArray, grid_L: NDArray[Any], stamps: NDArray[Any], has_zone: bool
) -> pa.Array:
    """Return the stamps of a grid in the type of the column that some of them are from."""
    kind = column.type
    if pa.types.is_temporal(kind):
        return pa.array(grid_L, pa.timestamp("us", tz="UTC" if has_zone else None)).cast(kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):  # counted from an epoch on
        first, last = column[0].as_py(), column[-1].as_py()
        steps = (grid_L - stamps[0]).astype(np.int64).tolist()
        whole = steps[np.searchsorted(grid_L, stamps[-1])]
        counted = [first + (last - first) * step / whole for step in steps]
        if pa.types.is_integer(kind):
            counted = [first + (last - first) * step // whole for step in steps]
        return pa.array(counted, kind)
    texts = pd.DatetimeIndex(grid_L, tz="UTC" if has_zone else None).astype(str)
    return pa.array(texts.tolist()).cast(kind)


def _warn_of_long_gaps(table: Table, is_missing_LC: NDArray[np.bool_], context_length: int) -> None:
    for place, own in enumerate(table.variates):
        padded_L = np.concatenate(([False], is_missing_LC[:, place], [False]))
        begins, ends = np.flatnonzero(padded_L[1:] != padded_L[:-1]).reshape(-1, 2).T
        long = np.flatnonzero(ends - begins > context_length // 2)
        if len(long):
            logger.warning(
                "%s: %s is missing for %d rows from row %d on, more than half of the %d that the "
                "package looks at: what is filled in there is little more than a guess",
                table.path, own, ends[long[0]] - begins[long[0]], begins[long[0]] + 1,
                context_length,
            )  # fmt: skip


def _classify(
    predictor: TaskPredictor, name: str, card: Mapping[str, Any], path: str | Path
) -> pa.Table:
    """Tell the class of each case."""
    mean_C, std_C = (np.array(_of_card(card, key), np.float64) for key in ("mean", "std"))
    classes, scaler = np.array(_of_card(card, "classes")), CaseScaler(mean_C=mean_C, std_C=std_C)
    cases = read_unlabelled_cases(path)
    if cases.num_variates != len(mean_C):
        raise DataError(
            f"{path}: cases have {cases.num_variates} channels, but the package was trained on "
            f"{len(mean_C)}"
        )
    windows_BCL = np.concatenate(
        [
            fit_length(scaler.scale(own_CL)[None], predictor.context_length)
            for own_CL in cases.values
        ]
    )
    logits_BY = torch.from_numpy(predictor.predict(windows_BCL, name))
    probability_BY: NDArray[np.float32] = logits_BY.softmax(-1).numpy()
    raw = read_columns(Path(path))
    named = {
        field.name: raw.column(field.name)
        for field in raw.schema
        if not pa.types.is_nested(field.type)
    }
    return _beside(
        named,
        {
            "case": np.arange(1, len(windows_BCL) + 1),
            "class": classes[probability_BY.argmax(axis=1)],
            **{f"probability {own}": probability_BY[:, y] for y, own in enumerate(classes)},
        },
        path,
    )


def _continue(predictor: TaskPredictor, name: str, path: str | Path) -> pa.Table:
    """Forecast what follows each series, scaled as those that were learned from."""
    names, values = read_histories(path)
    forecaster = TaskForecaster(predictor, name)
    horizon = forecaster.prediction_length
    loc_S, scale_S = scales_of_series(values, horizon)
    context_SCL = np.concatenate(
        [
            fit_length(bounded((own_L - loc) / scale)[None, None], predictor.context_length)
            for own_L, loc, scale in zip(values, loc_S, scale_S, strict=True)
        ]
    )
    scaled_SQ = forecaster.forecast_batch(context_SCL, horizon).mean_BCQ[:, 0]
    forecast_SQ = scaled_SQ * scale_S[:, None] + loc_S[:, None]
    return pa.table(
        {
            "item_id": np.repeat(names, horizon),
            "step": np.tile(np.arange(1, horizon + 1), len(names)),
            "forecast": forecast_SQ.ravel().astype(np.float32),
        }
    )
