"""Where a series is split in time into its training part and the rest, and which never train.

One rule for the whole product: the first `train_fraction` of every series trains, what follows
never does. UTSD and both papers split 9:1 within each series. A corpus may besides hold out whole
series, so that validation also sees recordings of which no point was trained on.
"""

import hashlib
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


def is_held_out(source: str, item_id: str, held_out_fraction: float) -> bool:
    """Decide by the name whether a recording, with all of its variates, is held out.

    A function of the name alone, so that it does not change when other series come or go.
    """
    if held_out_fraction == 0.0:
        return False
    digest = hashlib.sha256(f"{source}/{item_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out_fraction * 2**64
