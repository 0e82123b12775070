"""Arrays of users: what comes in, checked, and what a run makes of it.

Shapes: C variates, L rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.table import Table
from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.config import ForecastTaskConfig, ImputationTaskConfig
from tsmoe.tasks.windows import Floats

ARRAY = "X"
"""What errors call the array."""


def rows_of(X: Any) -> NDArray[np.float64]:
    """Return rows_LC of an array (L, C) or (L,), or of what numpy makes one of.

    Raises:
        DataError: for another shape, what is no number, or infinite values.
    """
    try:
        rows_LC = np.asarray(X, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"X is no array of numbers: {error}") from error
    if rows_LC.ndim == 1:
        rows_LC = rows_LC[:, None]
    if rows_LC.ndim != 2 or 0 in rows_LC.shape:
        raise DataError(f"X has shape {np.shape(X)}; expected rows in the order of time x variates")
    if np.isinf(rows_LC).any():
        raise DataError("X holds infinite values; mark what is missing as NaN")
    return rows_LC


def table_of(rows_LC: NDArray[np.float64]) -> Table:
    """Return a table without times."""
    names = tuple(f"variate {place}" for place in range(rows_LC.shape[1]))
    values_LC = rows_LC.astype(np.float32)
    return Table(path=ARRAY, timestamps=None, freq=None, variates=names, values_LC=values_LC)


def split_all(
    task: ForecastTaskConfig | ImputationTaskConfig, num_rows: int, *, context_length: int
) -> tuple[float, float, float]:
    """Return shares that let nearly all rows train and validate: `score` is given its own.

    Raises:
        DataError: if there are too few rows for that.
    """
    if task.split is not None:
        return task.split
    length = task.prediction_length if isinstance(task, ForecastTaskConfig) else 0
    # The protocol wants a test part; it is as short as it may be, and never looked at.
    test = max(length + 1, num_rows // 100) / num_rows
    validation = max(0.2, (length + 1) / num_rows)
    train = 1 - validation - test
    needed = max(
        math.ceil((context_length + 2 * length + 2) / 0.8) + 1, context_length + 3 * (length + 2)
    )
    if train <= 0 or int(num_rows * train) < context_length + length:
        raise DataError(
            f"X has {num_rows} rows; about {needed} are needed for model.context_length="
            f"{context_length} and {length} steps to forecast"
        )
    return train, validation, test


def check_variates(rows_LC: NDArray[np.float64] | Floats, expected: int) -> None:
    """Refuse another number of variates than was learned from."""
    if rows_LC.shape[1] != expected:
        raise DataError(f"X has {rows_LC.shape[1]} variates, fitted were {expected}")


def flags_of(y: Any, length: int) -> NDArray[np.bool_]:
    """Return labels of rows as bool.

    Raises:
        ConfigError: if there is not one 0 or 1 for each row.
    """
    flags = np.asarray(y)
    if flags.shape != (length,) or not np.isin(flags, (0, 1)).all():
        raise ConfigError(
            f"y must hold 0, or 1 for anomalies, for each of the {length} rows of X, got an array "
            f"of shape {flags.shape} with values such as {np.unique(flags)[:3].tolist()}; of what "
            "predict returns that is y == -1"
        )
    return flags.astype(bool)
