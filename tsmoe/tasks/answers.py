"""What a package of tasks makes of rows, tables, cases and series that nobody has labelled.

Shapes: B cases, C variates, L rows, Q prediction steps, S series, Y classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from data_pipeline.table import read_table
from tsmoe.errors import CheckpointError, ConfigError, DataError
from tsmoe.tasks.anomaly import reconstruction_scores
from tsmoe.tasks.case_data import read_unlabelled_cases
from tsmoe.tasks.classification import CaseScaler
from tsmoe.tasks.imputation import fill_rows
from tsmoe.tasks.predictor import TaskForecaster, TaskPredictor, fit_length
from tsmoe.tasks.recordings import read_recordings
from tsmoe.tasks.series_data import read_histories
from tsmoe.tasks.task_file import listed
from tsmoe.tasks.windows import bounded

ANSWERED = ("anomaly", "imputation", "classification", "series")
"""Kinds of tasks that answer here; tables are forecast by `tsmoe forecast`."""


def answer(
    predictor: TaskPredictor,
    path: str,
    *,
    task: str | None = None,
    entity_column: str | None = None,
    time_column: str | None = None,
    ignores_time: bool = False,
) -> pd.DataFrame:
    """Answer for each row, case or series of a file, scaled as the task was trained.

    Args:
        predictor: of the package.
        path: the file.
        task: its kind or name; None: the only one that answers.
        entity_column: of recordings; None: found by its name. The same for what follows.
        time_column: of recordings and tables.
        ignores_time: of tables: take rows as they stand.

    Returns:
        Of `anomaly` the score and the flag of each row, of `imputation` the table without gaps, of
        `classification` the class and the probabilities of each case, of `series` the steps that
        follow each one.

    Raises:
        ConfigError: if the package has no such task, or several.
        CheckpointError: if its card lacks what the answer needs.
        DataError: if the file does not fit it.
    """
    name, card = _task_of(predictor, task)
    kind = card["type"]
    given = {"entity_column": entity_column, "time_column": time_column,
             "ignores_time": ignores_time or None}  # fmt: skip
    heeded = {"anomaly": ("entity_column", "time_column"),
              "imputation": ("time_column", "ignores_time")}.get(kind, ())  # fmt: skip
    for option, value in given.items():
        if value is not None and option not in heeded:
            raise ConfigError(f"{option} is given, but the task {kind} has no use for it")
    if kind == "anomaly":
        return _score(predictor, name, card, path, entity_column, time_column)
    if kind == "imputation":
        return _fill(predictor, name, card, path, time_column, ignores_time)
    if kind == "classification":
        return _classify(predictor, name, card, path)
    return _continue(predictor, name, path)


def _task_of(predictor: TaskPredictor, asked: str | None) -> tuple[str, dict[str, Any]]:
    cards = predictor.card.get("tasks", {})
    if asked is None:
        answering = [name for name, card in cards.items() if card.get("type") in ANSWERED]
        if len(answering) != 1:
            there = ", ".join(f"{name} ({card.get('type')})" for name, card in cards.items())
            raise ConfigError(
                f"name the task; the package has {there or 'none'}"
                + ("" if answering else "; forecasts of tables are made by tsmoe forecast")
            )
        asked = answering[0]
    name = predictor.task(asked)
    card = cards.get(name, {})
    if card.get("type") not in ANSWERED:
        raise ConfigError(
            f"task {name} is a {card.get('type')}; forecasts of tables are made by tsmoe forecast"
        )
    return name, card


def _known(card: dict[str, Any], key: str) -> Any:  # whatever the card holds
    if card.get(key) is None:
        raise CheckpointError(
            f"the package's card does not say {key!r} of its task, as it was written by an earlier "
            "version or its run broke off; train it anew"
        )
    return card[key]


def _score(
    predictor: TaskPredictor,
    name: str,
    card: dict[str, Any],
    path: str,
    entity_column: str | None,
    time_column: str | None,
) -> pd.DataFrame:
    """Score each row by its reconstruction error, entity by entity."""
    entities, threshold = _known(card, "entities"), _known(card, "threshold")
    recordings = read_recordings(
        path, card["variates"], entity_column=entity_column, time_column=time_column
    )
    names = recordings.entities
    is_only_one = len(names) == len(entities) == 1
    strangers = [] if is_only_one else [own for own in names if own not in entities]
    if strangers:
        raise DataError(
            f"{path}: the package was not trained on the entities {listed(strangers)}; it knows "
            f"{listed(list(entities))}; leave the others out or train with them"
        )
    score_L = np.full(len(recordings.values_LC), np.nan)
    for own, rows in zip(names, recordings.rows, strict=True):
        scale = next(iter(entities.values())) if is_only_one else entities[own]
        mean_C, std_C = (np.array(scale[key], np.float64) for key in ("mean", "std"))
        score_L[rows] = reconstruction_scores(
            predictor,
            name,
            bounded((recordings.values_LC[rows] - mean_C) / std_C),
            patch_length=predictor.model.config.patch_length,
            hidden_share=card["hidden_share"],
        )
    columns: dict[str, Any] = {key: column.to_pandas() for key, column in recordings.named.items()}
    taken = [key for key in ("score", "is_anomaly") if key in columns]
    if taken:
        raise DataError(f"{path}: the column {taken[0]!r} would stand twice; rename it")
    # Without anything recorded there is no score, and nothing to warn of.
    return pd.DataFrame({**columns, "score": score_L, "is_anomaly": score_L > threshold})


def _fill(
    predictor: TaskPredictor,
    name: str,
    card: dict[str, Any],
    path: str,
    time_column: str | None,
    ignores_time: bool,
) -> pd.DataFrame:
    """Fill what is missing of a table; what is there stays as it is."""
    mean_C, std_C = (np.array(_known(card, key), np.float64) for key in ("mean", "std"))
    table = read_table(
        path, time_column=time_column, columns=card["variates"], ignores_time=ignores_time
    )
    values_LC = table.values_LC
    empty = [
        own
        for own, is_seen in zip(table.variates, np.isfinite(values_LC).any(axis=0), strict=True)
        if not is_seen
    ]
    if empty:
        raise DataError(
            f"{path}: nothing is observed of {listed(empty)}, so there is nothing to fill it from; "
            "give rows with values"
        )
    filled_LC = fill_rows(predictor, name, bounded((values_LC - mean_C) / std_C)) * std_C + mean_C
    filled_LC = np.where(np.isfinite(values_LC), values_LC, filled_LC).astype(np.float32)
    columns: dict[str, Any] = {}
    if table.timestamps is not None:
        columns[time_column or "date"] = table.timestamps
    columns |= {own: filled_LC[:, place] for place, own in enumerate(table.variates)}
    return pd.DataFrame(columns)


def _classify(predictor: TaskPredictor, name: str, card: dict[str, Any], path: str) -> pd.DataFrame:
    """Tell the class of each case."""
    scaler = CaseScaler(mean_C=np.array(card["mean"]), std_C=np.array(card["std"]))
    cases = read_unlabelled_cases(path)
    if cases.num_variates != len(scaler.mean_C):
        raise DataError(
            f"{path}: cases have {cases.num_variates} channels, but the package was trained on "
            f"{len(scaler.mean_C)}"
        )
    windows_BCL = np.concatenate(
        [
            fit_length(scaler.scale(own_CL)[None], predictor.context_length)
            for own_CL in cases.values
        ]
    )
    logits_BY = torch.from_numpy(predictor.predict(windows_BCL, name))
    probability_BY: NDArray[np.float32] = logits_BY.softmax(-1).numpy()
    classes = np.array(card["classes"])
    return pd.DataFrame(
        {
            "case": np.arange(1, len(windows_BCL) + 1),
            "class": classes[probability_BY.argmax(axis=1)],
            **{f"probability {own}": probability_BY[:, y] for y, own in enumerate(classes)},
        }
    )


def _continue(predictor: TaskPredictor, name: str, path: str) -> pd.DataFrame:
    """Forecast what follows each series, scaled by its own mean and deviation."""
    names, values = read_histories(path)
    loc_S = np.array([np.nanmean(own_L.astype(np.float64)) for own_L in values])
    std_S = np.array([np.nanstd(own_L.astype(np.float64)) for own_L in values])
    scale_S = np.where(std_S > 0, std_S, 1.0)
    context_SCL = np.concatenate(
        [
            fit_length(bounded((own_L - loc) / scale)[None, None], predictor.context_length)
            for own_L, loc, scale in zip(values, loc_S, scale_S, strict=True)
        ]
    )
    forecaster = TaskForecaster(predictor, name)
    horizon = forecaster.prediction_length
    scaled_SQ = forecaster.forecast_batch(context_SCL, horizon).mean_BCQ[:, 0]
    forecast_SQ = scaled_SQ * scale_S[:, None] + loc_S[:, None]
    return pd.DataFrame(
        {
            "item_id": np.repeat(names, horizon),
            "step": np.tile(np.arange(1, horizon + 1), len(names)),
            "forecast": forecast_SQ.ravel().astype(np.float32),
        }
    )
