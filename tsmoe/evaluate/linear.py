"""The linear baseline: one least squares map from context to prediction, in closed form.

Shapes: B windows, C variates, L context steps, Q prediction steps, R rows (one variate of one
window), G = L + 1 inputs of the map (the last one is the constant 1).
"""

import logging
from dataclasses import dataclass

import numpy as np

from tsmoe.errors import DataError
from tsmoe.evaluate.baselines import fill_gaps
from tsmoe.evaluate.protocol import Borders, iterate_windows

logger = logging.getLogger(__name__)

RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths to choose from, in units of the mean square of the inputs."""

MAX_FIT_ROWS = 60_000
"""Most rows to fit on: 60 000 x 672 take seconds on one core; beyond, windows are drawn."""


@dataclass(frozen=True)
class Linear:
    """Predicts with one linear map that all variates share, relative to the last observed value.

    With the last value subtracted before and added after the map this is NLinear, fitted exactly
    instead of by gradient descent. DLinear splits the context into a moving average and the rest
    and maps both linearly; the sum of the two is again a linear map of the context, so its best
    fit lies within what is searched here. Gaps in the context are interpolated.

    Source: DLinear and NLinear (arXiv 2205.13504). Departure: ridge, closed form.
    """

    weight_GQ: np.ndarray
    ridge: float
    """The chosen element of `RIDGE_GRID`."""

    def forecast(self, context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
        """Return mean_BCQ; `prediction_length` must be the fitted one."""
        if prediction_length != self.weight_GQ.shape[1]:
            raise ValueError(
                f"fitted for {self.weight_GQ.shape[1]} prediction steps, asked for "
                f"{prediction_length}; fit again"
            )
        filled_BCL = fill_gaps(context_BCL)
        last_BC1 = filled_BCL[..., -1:]
        weight_GQ = self.weight_GQ.astype(np.float32)
        return (filled_BCL - last_BC1) @ weight_GQ[:-1] + weight_GQ[-1] + last_BC1


@dataclass(frozen=True)
class _NormalEquations:
    """What least squares needs of any number of rows: all later work is independent of them."""

    inputs_GG: np.ndarray
    cross_GQ: np.ndarray
    target_energy: float
    rows: int

    def squared_error(self, weight_GQ: np.ndarray) -> float:
        """Sum the squared errors that the map makes on these rows, without seeing them again."""
        explained = np.sum(weight_GQ * (self.inputs_GG @ weight_GQ))
        return float(explained - 2 * np.sum(weight_GQ * self.cross_GQ) + self.target_energy)


def fit_linear(
    values_LC: np.ndarray,
    borders: Borders,
    *,
    context_length: int,
    prediction_length: int,
    path: str,
) -> Linear:
    """Fit on the train windows and choose the ridge strength on the validation windows.

    Rows with a target that is not observed are left out. If train or validation has more than
    `MAX_FIT_ROWS` rows, some of its windows are drawn; the evaluation never skips.

    Args:
        values_LC: the whole table, scaled.
        path: the table, for the error message.

    Raises:
        DataError: if train or validation has no row with all targets observed.
    """
    parts = {
        "train": (context_length, borders.train_end),
        "validation": (borders.train_end, borders.validation_end),
    }
    sums = {
        part: _accumulate(
            values_LC,
            first_target=first_target,
            end=end,
            context_length=context_length,
            prediction_length=prediction_length,
        )
        for part, (first_target, end) in parts.items()
    }
    for part, equations in sums.items():
        if equations.rows == 0:
            raise DataError(
                f"{path}: no {part} window of {context_length} + {prediction_length} rows has "
                "all targets observed in any variate, so the linear baseline cannot be fitted; "
                "shorten the horizon or fill the gaps"
            )
    candidates = [Linear(_solve(sums["train"], ridge), ridge) for ridge in RIDGE_GRID]
    return min(candidates, key=lambda linear: sums["validation"].squared_error(linear.weight_GQ))


def fitted_windows(windows: int, num_variates: int) -> np.ndarray:
    """Choose which windows to fit on: all, or as many as give `MAX_FIT_ROWS` rows.

    Drawn at random with a fixed seed. A regular stride would do as well, except where it shares
    a factor with the season: a stride of 24 on hourly data shows one hour of the day only.
    """
    most = max(1, MAX_FIT_ROWS // num_variates)
    if windows <= most:
        return np.arange(windows)
    logger.info("linear baseline: fits on %d of %d windows", most, windows)
    return np.sort(np.random.default_rng(0).choice(windows, size=most, replace=False))


def _accumulate(
    values_LC: np.ndarray,
    *,
    first_target: int,
    end: int,
    context_length: int,
    prediction_length: int,
) -> _NormalEquations:
    windows = end - first_target - prediction_length + 1
    inputs_GG = np.zeros((context_length + 1, context_length + 1))
    cross_GQ = np.zeros((context_length + 1, prediction_length))
    target_energy, rows = 0.0, 0
    for block in iterate_windows(
        values_LC,
        first_target=first_target,
        end=end,
        context_length=context_length,
        prediction_length=prediction_length,
        places_B=fitted_windows(windows, values_LC.shape[1]),
    ):
        is_usable_BC = np.isfinite(block.target_BCQ).all(axis=-1)
        is_usable_BC &= np.isfinite(block.context_BCL).any(axis=-1)
        context_RL = fill_gaps(block.context_BCL[is_usable_BC]).astype(np.float64)
        last_R1 = context_RL[:, -1:]
        inputs_RG = np.concatenate([context_RL - last_R1, np.ones_like(last_R1)], axis=1)
        target_RQ = block.target_BCQ[is_usable_BC] - last_R1
        inputs_GG += inputs_RG.T @ inputs_RG
        cross_GQ += inputs_RG.T @ target_RQ
        target_energy += float(np.square(target_RQ).sum())
        rows += len(inputs_RG)
    return _NormalEquations(inputs_GG, cross_GQ, target_energy, rows)


def _solve(train: _NormalEquations, ridge: float) -> np.ndarray:
    # The last context step minus itself is 0, hence the equations are singular without a ridge.
    mean_energy = float(np.diag(train.inputs_GG)[:-1].mean())
    penalty_G = np.full(len(train.inputs_GG), ridge * (mean_energy or 1.0))  # 0: all constant
    penalty_G[-1] = 0.0  # the constant input is not shrunk
    return np.linalg.solve(train.inputs_GG + np.diag(penalty_G), train.cross_GQ)
