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
from tsmoe.evaluate.baselines import fill_gaps
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
    on validation windows. Rows in which a step to forecast is not observed are left out; where
    there are no others, such steps are interpolated.

    Returns:
        weight_QL, which holds in any scale.
    """

    def training_batch(items: Integers) -> WindowBatch:
        return task.training_batch(items, items)

    parts = [(task.num_train, training_batch), (task.num_validation, task.validation_batch)]
    train, validation = (_equations(task, model, *part) for part in parts)
    if not (train.rows and validation.rows):
        logger.info("%s: no window is whole; least squares interpolates", task.source)
        train, validation = (_equations(task, model, *part, fills=True) for part in parts)
    weight_LQ, ridge = fit_ridge(train, validation)
    logger.info(
        "%s: the forecast begins as least squares over %d rows, ridge %g",
        task.source, train.rows, ridge,
    )  # fmt: skip
    return torch.from_numpy(weight_LQ.T.astype(np.float32))


def _equations(
    task: Task,
    model: PatchMoE,
    count: int,
    batch_of: Callable[[Integers], WindowBatch],
    *,
    fills: bool = False,
) -> NormalEquations:
    length, horizon = model.config.context_length, _prediction_length(task)
    equations = NormalEquations(length, horizon)
    num_variates = batch_of(np.arange(1)).values_BCL.shape[1]
    places = fitted_windows(count, num_variates)
    for first in range(0, len(places), _WINDOWS_AT_ONCE):
        batch = batch_of(places[first : first + _WINDOWS_AT_ONCE])
        context_BCL, observed_BCL = batch.values_BCL[..., :length], batch.observed_BCL[..., :length]
        seen_BCL, loc_BC1, scale_BC1 = model.normalise(context_BCL, observed_BCL)
        is_target_BCQ = batch.is_target_BCL[..., length:]
        target_BCQ = torch.where(is_target_BCQ, batch.values_BCL[..., length:] - loc_BC1, torch.nan)
        target_BCQ = torch.from_numpy(fill_gaps(target_BCQ.numpy())) if fills else target_BCQ
        counts_BC = is_target_BCQ.any(-1) if fills else is_target_BCQ.all(-1)
        seen_BCL = seen_BCL * scale_BC1
        equations.add(seen_BCL[counts_BC].numpy(), target_BCQ[counts_BC].numpy())
    return equations


def _prediction_length(task: Task) -> int:
    head = task.head()
    assert isinstance(head, ForecastHeadConfig), "others have no shortcut"
    return head.prediction_length
