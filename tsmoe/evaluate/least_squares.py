"""Ridge regression in closed form, of any number of rows that are seen once.

Shapes: R rows, G inputs of the map, Q outputs.
"""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)

RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge strengths to choose from, in units of the mean square of the inputs."""

MAX_FIT_ROWS = 60_000
"""Most rows to fit on: 60 000 x 672 take seconds on one core; beyond, windows are drawn."""


class NormalEquations:
    """What least squares needs of any number of rows: all later work is independent of them."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        self.inputs_GG = np.zeros((num_inputs, num_inputs))
        self.cross_GQ = np.zeros((num_inputs, num_outputs))
        self.target_energy_Q = np.zeros(num_outputs)
        self.rows = 0

    def add(self, inputs_RG: np.ndarray, target_RQ: np.ndarray) -> None:
        """See some rows."""
        inputs_RG = inputs_RG.astype(np.float64, copy=False)
        self.inputs_GG += inputs_RG.T @ inputs_RG
        self.cross_GQ += inputs_RG.T @ target_RQ
        self.target_energy_Q += np.square(target_RQ, dtype=np.float64).sum(axis=0)
        self.rows += len(inputs_RG)

    def merge(self, other: NormalEquations) -> None:
        """See the rows that another has seen."""
        self.inputs_GG += other.inputs_GG
        self.cross_GQ += other.cross_GQ
        self.target_energy_Q += other.target_energy_Q
        self.rows += other.rows

    def solve(self, ridge: float, *, num_free: int = 0) -> np.ndarray:
        """Return weight_GQ; the last `num_free` inputs, such as a constant, are not shrunk."""
        shrunk = len(self.inputs_GG) - num_free
        mean_energy = float(np.diag(self.inputs_GG)[:shrunk].mean())
        penalty_G = np.full(len(self.inputs_GG), ridge * (mean_energy or 1.0))  # 0: all constant
        penalty_G[shrunk:] = 0.0
        return np.linalg.solve(self.inputs_GG + np.diag(penalty_G), self.cross_GQ)

    def squared_errors(self, weight_GQ: np.ndarray) -> np.ndarray:
        """Sum, for each output, the squared errors of a map on these rows, unseen again."""
        explained_Q = np.sum(weight_GQ * (self.inputs_GG @ weight_GQ), axis=0)
        return explained_Q - 2 * np.sum(weight_GQ * self.cross_GQ, axis=0) + self.target_energy_Q


def fit_ridge(
    train: NormalEquations, validation: NormalEquations, *, num_free: int = 0
) -> tuple[np.ndarray, float]:
    """Fit on train, with the strength of `RIDGE_GRID` that is best on validation.

    Returns:
        weight_GQ and the strength.
    """
    fitted = [(train.solve(ridge, num_free=num_free), ridge) for ridge in RIDGE_GRID]
    return min(fitted, key=lambda found: validation.squared_errors(found[0]).sum())


def fitted_windows(windows: int, num_variates: int, *, max_rows: int = MAX_FIT_ROWS) -> np.ndarray:
    """Choose which windows to fit on: all, or as many as give `max_rows` rows.

    Drawn at random with a fixed seed. A regular stride would do as well, except where it shares
    a factor with the season: a stride of 24 on hourly data shows one hour of the day only.
    """
    most = max(1, max_rows // num_variates)
    if windows <= most:
        return np.arange(windows)
    logger.info("least squares: fits on %d of %d windows", most, windows)
    return np.sort(np.random.default_rng(0).choice(windows, size=most, replace=False))
