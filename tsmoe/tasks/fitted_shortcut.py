"""The linear map that a forecast begins as: least squares over the training windows.

Shapes: B windows, C variates, L context points, Q prediction steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.evaluate.least_squares import NormalEquations, fit_ridge, fitted_windows
from tsmoe.heads.task import ForecastHeadConfig
from tsmoe.models.patch_moe import PatchMoE
from tsmoe.tasks.task import Task
from tsmoe.tasks.windows import Integers

logger = logging.getLogger(__name__)

_WINDOWS_AT_ONCE = 256


def fit_shortcut(task: Task, model: PatchMoE) -> Tensor:
    """Fit the map from a window, less its location, to what follows it, less the same.

    Errors are in the unit of the values, as they are validated; the strength of the ridge is chosen
    on validation windows. Rows in which a step to forecast is not observed are left out.

    Returns:
        weight_QL, which holds in any scale.

    Raises:
        DataError: if there is no row to fit on.
    """

    def training_batch(items: Integers) -> WindowBatch:
        return task.training_batch(items, items)

    train = _equations(task, model, task.num_train, training_batch)
    validation = _equations(task, model, task.num_validation, task.validation_batch)
    for part, equations in {"training": train, "validation": validation}.items():
        if not equations.rows:
            raise DataError(
                f"{task.source}: no {part} window of {model.config.context_length} points has all "
                f"{_prediction_length(task)} steps after it observed, so that there is nothing to "
                f"fit tasks.{task.name}.shortcut on; use shortcut=from_mean"
            )
    weight_LQ, ridge = fit_ridge(train, validation)
    logger.info(
        "%s: the forecast begins as least squares over %d rows, ridge %g",
        task.source, train.rows, ridge,
    )  # fmt: skip
    return torch.from_numpy(weight_LQ.T.astype(np.float32))


def _equations(
    task: Task, model: PatchMoE, count: int, batch_of: Callable[[Integers], WindowBatch]
) -> NormalEquations:
    length, horizon = model.config.context_length, _prediction_length(task)
    equations = NormalEquations(length, horizon)
    num_variates = batch_of(np.arange(1)).values_BCL.shape[1]
    places = fitted_windows(count, num_variates)
    for first in range(0, len(places), _WINDOWS_AT_ONCE):
        batch = batch_of(places[first : first + _WINDOWS_AT_ONCE])
        context_BCL, observed_BCL = batch.values_BCL[..., :length], batch.observed_BCL[..., :length]
        loc_BC1, _ = model.statistics(context_BCL, observed_BCL)
        seen_BCL = torch.where(observed_BCL, context_BCL - loc_BC1, 0)
        target_BCQ = batch.values_BCL[..., length:] - loc_BC1
        is_whole_BC = batch.is_target_BCL[..., length:].all(-1)
        equations.add(seen_BCL[is_whole_BC].numpy(), target_BCQ[is_whole_BC].numpy())
    return equations


def _prediction_length(task: Task) -> int:
    head = task.head()
    assert isinstance(head, ForecastHeadConfig), "others have no shortcut"
    return head.prediction_length
