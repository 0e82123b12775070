"""Open data for a model that is trained already, by the settings that its package remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tsmoe.config import decode
from tsmoe.errors import CheckpointError, ConfigError, DataError
from tsmoe.tasks.classification import CaseScaler, ClassificationTask
from tsmoe.tasks.config import ClassificationTaskConfig, TaskRunConfig
from tsmoe.tasks.predictor import TaskPredictor
from tsmoe.tasks.run import open_task
from tsmoe.tasks.task import Task

# Settings that name what is in one file.
_OF_A_FILE = ("columns", "time_column", "split", "season", "test_path", "entity_column",
              "label_column", "split_column", "train_share")  # fmt: skip

# What the command line calls them otherwise.
_OPTIONS = {"prediction_length": "prediction_length (--horizon)",
            "test_path": "test_path (--test-data)"}  # fmt: skip


def reopen_task(
    predictor: TaskPredictor,
    kind: str,
    path: str,
    *,
    columns: list[str] | None = None,
    time_column: str | None = None,
    ignores_time: bool = False,
    split: tuple[float, float, float] | None = None,
    prediction_length: int | None = None,
    test_path: str | None = None,
) -> Task:
    """Open a file as a run would, for a package's task of a kind.

    Args:
        predictor: of the package.
        kind: `forecast`, `imputation`, `anomaly` or `classification`.
        path: the file.
        columns: of a table; None: as the package remembers. The same for what follows.
        time_column: of a table.
        ignores_time: of a table.
        split: shares of train, validation and test.
        prediction_length: steps to forecast; longer than the head's is rolled.
        test_path: of series.

    Raises:
        ConfigError: if the package has no such task, or settings are given that it has no use for.
        DataError: if the file does not fit the model.
    """
    name = predictor.task(kind)
    config = _config(predictor.card)
    task = config.tasks[name]
    given: dict[str, Any] = {
        "columns": columns,
        "time_column": time_column,
        "ignores_time": ignores_time or None,
        "split": split,
        "prediction_length": prediction_length,
        "test_path": test_path,
    }
    given = {key: value for key, value in given.items() if value is not None}
    known = vars(task).keys()
    if strangers := sorted(key for key in given if key not in known):
        option = _OPTIONS.get(strangers[0], strangers[0])
        raise ConfigError(f"{option} is given, but the task {kind} has no use for it")
    if Path(path).resolve() != Path(config.path_of(name)).resolve():
        # What the run was told of its own file says nothing of another one.
        of_file: Any = {key: None for key in _OF_A_FILE if key in known}
        task = replace(task, **of_file)
    if isinstance(task, ClassificationTaskConfig):
        given["fits_context"] = False  # the model has a length
    try:
        task = replace(task, **given)
    except ValueError as error:
        raise ConfigError(f"task {name}: {error}") from error
    model = replace(config.model, context_length=predictor.context_length)
    opened = open_task(name, task, path, model=model, seed=config.seed)
    if isinstance(opened, ClassificationTask):
        _take_over(opened, predictor, name)
    return opened


def _config(card: dict[str, Any]) -> TaskRunConfig:
    values = card.get("config")
    if not isinstance(values, dict) or "tasks" not in values:
        raise CheckpointError(
            "the package's card does not say how its tasks were opened; train it anew"
        )
    return decode(TaskRunConfig, values, origin="card.json")


def _take_over(task: ClassificationTask, predictor: TaskPredictor, name: str) -> None:
    """Scale cases as those that the model was trained on."""
    card = predictor.card["tasks"][name]
    if list(task.data.classes) != card["classes"]:
        raise DataError(
            f"{task.source}: its classes are {', '.join(task.data.classes)}, but the package tells "
            f"{', '.join(card['classes'])} apart; train on this file"
        )
    scaler = CaseScaler(mean_C=np.array(card["mean"]), std_C=np.array(card["std"]))
    if task.data.train.num_variates != len(scaler.mean_C):
        raise DataError(
            f"{task.source}: cases have {task.data.train.num_variates} channels, but the package "
            f"was trained on {len(scaler.mean_C)}"
        )
    task.scaler = scaler
