"""Runs of True in a mask over time, and the checks that all anomaly measures share.

Shapes: L steps, A events (runs of consecutive True steps).
"""

import numpy as np


def find_events(is_true_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List the runs of True.

    Returns:
        starts_A, ends_A: first step of each run and the step after its last one, in order.
    """
    steps = np.flatnonzero(np.diff(np.asarray(is_true_L, dtype=np.int8), prepend=0, append=0))
    return steps[::2], steps[1::2]


def check_labels(values_L: np.ndarray, is_anomaly_L: np.ndarray, *, name: str) -> None:
    """Refuse labels that do not belong to the values or know one kind of step only.

    Args:
        name: of the values, for the error line.

    Raises:
        ValueError: if an array has more than one axis, the lengths differ, a label is no bool, or
            no step or every step is an anomaly.
    """
    if values_L.ndim != 1 or values_L.shape != is_anomaly_L.shape:
        raise ValueError(
            f"{name} {values_L.shape} and is_anomaly_L {is_anomaly_L.shape} must have one axis "
            "of equal length; give one value per labelled step"
        )
    if is_anomaly_L.dtype != np.bool_:
        raise ValueError(f"is_anomaly_L must be of bool, got {is_anomaly_L.dtype}; compare with 0")
    count = int(is_anomaly_L.sum())
    if count in (0, is_anomaly_L.size):
        kind = "no step is" if count == 0 else "all steps are"
        raise ValueError(
            f"is_anomaly_L has {is_anomaly_L.size} steps and {kind} an anomaly; "
            "the measures need steps of both kinds"
        )


def check_flags(is_flagged_L: np.ndarray, is_anomaly_L: np.ndarray) -> None:
    """Refuse flags that are no bool, and labels as in `check_labels`.

    Raises:
        ValueError: naming what came; scores taken for flags would all count as True.
    """
    if is_flagged_L.dtype != np.bool_:
        raise ValueError(
            f"is_flagged_L must be of bool, got {is_flagged_L.dtype}; compare with a threshold"
        )
    check_labels(is_flagged_L, is_anomaly_L, name="is_flagged_L")


def check_scores(scores_L: np.ndarray, is_anomaly_L: np.ndarray) -> None:
    """Refuse scores that are not finite, and labels as in `check_labels`.

    Raises:
        ValueError: saying how many scores are not finite and where the first one is.
    """
    check_labels(scores_L, is_anomaly_L, name="scores_L")
    check_finite(scores_L, name="scores_L")


def check_finite(scores_L: np.ndarray, *, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: saying how many there are and where the first one is.
    """
    broken = np.flatnonzero(~np.isfinite(scores_L))
    if broken.size:
        raise ValueError(
            f"{name}: {broken.size} of {scores_L.size} scores are not finite, "
            f"the first at step {broken[0]} ({scores_L[broken[0]]})"
        )
