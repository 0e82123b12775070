"""The linear baseline: one least squares map from context to prediction, in closed form.

Shapes: B windows, C variates, L context steps, Q prediction steps, R rows (one variate of one
window), G = L + 1 inputs of the map (the last one is the constant 1).
"""

from dataclasses import dataclass

import numpy as np

from tsmoe.errors import DataError
from tsmoe.evaluate.baselines import fill_gaps
from tsmoe.evaluate.least_squares import NormalEquations, fit_ridge, fitted_windows
from tsmoe.evaluate.protocol import Borders, iterate_windows


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
    # The last context step minus itself is 0, hence the equations are singular without a ridge;
    # the constant input is not shrunk.
    return Linear(*fit_ridge(sums["train"], sums["validation"], num_free=1))


def _accumulate(
    values_LC: np.ndarray,
    *,
    first_target: int,
    end: int,
    context_length: int,
    prediction_length: int,
) -> NormalEquations:
    windows = end - first_target - prediction_length + 1
    equations = NormalEquations(context_length + 1, prediction_length)
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
        equations.add(inputs_RG, block.target_BCQ[is_usable_BC] - last_R1)
    return equations
