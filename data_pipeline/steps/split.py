"""Where a series is split in time into its training part and the rest.

One rule for the whole product: the first `train_fraction` of every series trains, what follows
never does. UTSD and both papers split 9:1 within each series.
"""

from typing import overload

import numpy as np

DEFAULT_TRAIN_FRACTION = 0.9
"""Source: UTSD's own reader splits 9:1 in time within each series (arXiv 2402.02368)."""

_PARTS = 1_000_000


@overload
def train_length(length: int, train_fraction: float) -> int: ...
@overload
def train_length(length: np.ndarray, train_fraction: float) -> np.ndarray: ...
def train_length(length: int | np.ndarray, train_fraction: float) -> int | np.ndarray:
    """Count the points of the training part, rounded down.

    The fraction is taken to six decimals and the rest is integer arithmetic: in floating point
    `0.29 * 100` is just below 29, and would lose a point.

    Args:
        length: points of one series, or int64 of many.
        train_fraction: in (0, 1].
    """
    return length * round(train_fraction * _PARTS) // _PARTS
