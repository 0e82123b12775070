"""Volume under the surface: the range-based area under the ROC curve, over widths of a buffer.

A buffer around each anomaly forgives scores that rise a little early or late.

Shapes: L steps, A anomalous events with their buffers, I thresholds, W steps of one buffer side.

Source: Paparrizos et al. 2022, "Volume Under the Surface", PVLDB 15(11), section 4.
"""

import numpy as np

from tsmoe.evaluate.anomaly_events import check_scores, find_events

_NUM_THRESHOLDS = 250  # as in the authors' code; evenly spaced in rank


def vus_roc(scores_L: np.ndarray, is_anomaly_L: np.ndarray, *, max_buffer: int = 100) -> float:
    """Average the range-AUC-ROC over buffers of 0, 1, ..., max_buffer steps.

    Compare it within one data set only. Where anomalies are long beside the buffer, perfect scores
    have nearly 1 and random ones about 0.5. Anomalies of 2 steps with max_buffer 100 have 0.8 and
    0.7, since the buffer itself counts as anomalous; and many short anomalies without a buffer
    have 0.4 at random, since the true positive rate is multiplied by the share of them found.

    Args:
        scores_L: higher is more anomalous.
        max_buffer: steps, both sides of an anomaly together; the authors take the period of the
            series.

    Raises:
        ValueError: if max_buffer is negative, and as in `check_scores`.
    """
    check_scores(scores_L, is_anomaly_L)
    if max_buffer < 0:
        raise ValueError(f"max_buffer must be 0 or more steps, got {max_buffer}")
    order_L = np.argsort(scores_L)[::-1]
    ascending_L = np.sort(scores_L)
    ranks_I = np.linspace(0, len(scores_L) - 1, _NUM_THRESHOLDS).astype(int)
    thresholds_I = scores_L[order_L[ranks_I]]
    # Steps with a score >= threshold: more than rank + 1 where scores are tied.
    flagged_I = len(scores_L) - np.searchsorted(ascending_L, thresholds_I, side="left")
    areas = [
        _range_auc_roc(
            _add_buffer(is_anomaly_L, buffer),
            scores_L,
            num_anomalous=int(is_anomaly_L.sum()),
            order_L=order_L,
            thresholds_I=thresholds_I,
            flagged_I=flagged_I,
        )
        for buffer in range(max_buffer + 1)
    ]
    return float(np.mean(areas))


def _add_buffer(is_anomaly_L: np.ndarray, buffer: int) -> np.ndarray:
    """Let the labels fall off from 1 to sqrt(1/2) over half a buffer on both sides.

    Departure from the paper, as in the authors' code: the right side is one step shorter, since
    its slope starts on the last anomalous step.
    """
    labels_L = is_anomaly_L.astype(np.float64)
    half = buffer // 2
    if half == 0:
        return labels_L
    starts_A, ends_A = find_events(is_anomaly_L)
    distance_W = np.arange(1, half + 1)
    weight_W = np.sqrt(1 - distance_W / buffer)
    places = np.concatenate(
        [
            (starts_A[:, None] - distance_W).ravel(),
            (ends_A[:, None] - 1 + distance_W[:-1]).ravel(),
        ]
    )
    weights = np.concatenate(
        [np.tile(weight_W, len(starts_A)), np.tile(weight_W[:-1], len(starts_A))]
    )
    is_inside = (places >= 0) & (places < len(labels_L))
    labels_L += np.bincount(places[is_inside], weights[is_inside], minlength=len(labels_L))
    return np.minimum(labels_L, 1.0)


def _range_auc_roc(
    labels_L: np.ndarray,
    scores_L: np.ndarray,
    *,
    num_anomalous: int,
    order_L: np.ndarray,
    thresholds_I: np.ndarray,
    flagged_I: np.ndarray,
) -> float:
    positives = (num_anomalous + labels_L.sum()) / 2  # so that a buffer costs and gains by halves
    negatives = len(labels_L) - positives
    true_positives_I = np.cumsum(labels_L[order_L])[flagged_I - 1]

    starts_A, ends_A = find_events(labels_L > 0)  # buffers that touch make one event
    bounds = np.stack([starts_A, ends_A], axis=1).ravel()
    # The extra element makes the end of a last event a valid bound.
    peaks_A = np.sort(np.maximum.reduceat(np.append(scores_L, -np.inf), bounds)[::2])
    found_I = len(peaks_A) - np.searchsorted(peaks_A, thresholds_I, side="left")

    true_rate_I = np.minimum(true_positives_I / positives, 1.0) * found_I / len(peaks_A)
    false_rate_I = (flagged_I - true_positives_I) / negatives
    true_rate = np.concatenate([[0.0], true_rate_I, [1.0]])
    false_rate = np.concatenate([[0.0], false_rate_I, [1.0]])
    return float(np.trapezoid(true_rate, false_rate))
