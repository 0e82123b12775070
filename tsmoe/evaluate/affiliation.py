"""Affiliation precision and recall: how near flagged steps are to anomalies, against chance.

Step i is the interval [i, i + 1), so that flags and anomalies are sets on the line and all means
are integrals with a closed form. Each anomaly owns a zone, the points that are nearer to it than
to any other anomaly, and is judged there alone.

Shapes: L steps, A anomalous events, R flagged events inside one zone.

Source: Huet, Navarro, Rossi 2022 (arXiv 2206.13167), sections 3 and 4.
"""

from dataclasses import dataclass

import numpy as np

from tsmoe.evaluate.anomaly_events import check_flags, find_events


@dataclass(frozen=True)
class AffiliationScores:
    """Means over the zones of the anomalies; 1 is perfect and a random flag has about 0.5."""

    precision: float
    """Over zones with a flag; NaN where nothing is flagged."""
    recall: float
    """Over all zones; a zone without a flag counts 0."""
    f1: float
    """Harmonic mean of both; 0 where nothing is flagged."""


def affiliation(is_flagged_L: np.ndarray, is_anomaly_L: np.ndarray) -> AffiliationScores:
    """Compare flagged steps with anomalies by distance in time, scaled by chance.

    A flagged point counts the probability that a uniform point of the zone is at least as far from
    the anomaly; a point of the anomaly counts the probability that a uniform point of the zone is
    at least as far from it as the nearest flag of the zone.

    Without any flag, precision is undefined: it is NaN, recall is 0 and f1 is taken as 0.

    Raises:
        ValueError: if the lengths differ, a mask is no bool, or no step or every step is an
            anomaly.

    Source: arXiv 2206.13167, individual probabilities of section 4. Departure: f1 is not in the
    paper's definitions; it is the harmonic mean of the two means, as in later benchmarks.
    """
    check_flags(is_flagged_L, is_anomaly_L)
    starts_A, ends_A = find_events(is_anomaly_L)
    flag_starts, flag_ends = find_events(is_flagged_L)
    borders = np.concatenate([[0.0], (ends_A[:-1] + starts_A[1:]) / 2, [float(len(is_anomaly_L))]])

    precisions, recalls = [], []
    for a in range(len(starts_A)):
        zone = (float(borders[a]), float(borders[a + 1]))
        event = (float(starts_A[a]), float(ends_A[a]))
        inside = slice(
            int(np.searchsorted(flag_ends, zone[0], side="right")),
            int(np.searchsorted(flag_starts, zone[1], side="left")),
        )
        starts_R = np.maximum(flag_starts[inside], zone[0])
        ends_R = np.minimum(flag_ends[inside], zone[1])
        if len(starts_R) == 0:
            recalls.append(0.0)
            continue
        precisions.append(_zone_precision(starts_R, ends_R, event=event, zone=zone))
        recalls.append(_zone_recall(starts_R, ends_R, event=event, zone=zone))

    recall = float(np.mean(recalls))
    if not precisions:
        return AffiliationScores(precision=float("nan"), recall=recall, f1=0.0)
    precision = float(np.mean(precisions))
    total = precision + recall
    return AffiliationScores(
        precision=precision, recall=recall, f1=2 * precision * recall / total if total else 0.0
    )


def _zone_precision(
    starts_R: np.ndarray,
    ends_R: np.ndarray,
    *,
    event: tuple[float, float],
    zone: tuple[float, float],
) -> float:
    """Average over flagged points x of P(|X - event| >= |x - event|), X uniform on the zone."""
    margins = (event[0] - zone[0], zone[1] - event[1])
    # Inside the event the distance is 0 and every X is at least as far.
    within_R = _positive(np.minimum(ends_R, event[1]) - np.maximum(starts_R, event[0]))
    outside_R = np.zeros(len(starts_R))
    for near_R, far_R in (
        (_positive(event[0] - ends_R), _positive(event[0] - starts_R)),
        (_positive(starts_R - event[1]), _positive(ends_R - event[1])),
    ):
        for margin in margins:  # the part of the margin beyond distance d is margin - d long
            outside_R += (_positive(margin - near_R) ** 2 - _positive(margin - far_R) ** 2) / 2
    total = within_R + outside_R / (zone[1] - zone[0])
    return float(total.sum() / (ends_R - starts_R).sum())


def _zone_recall(
    starts_R: np.ndarray,
    ends_R: np.ndarray,
    *,
    event: tuple[float, float],
    zone: tuple[float, float],
) -> float:
    """Average over event points y of P(|X - y| >= distance to the nearest flag), X uniform."""
    middles = (ends_R[:-1] + starts_R[1:]) / 2
    # The stretch of the event whose nearest flag is the r-th one; empty where first >= last.
    first_R = np.maximum(np.concatenate([[zone[0]], middles]), event[0])
    last_R = np.minimum(np.concatenate([middles, [zone[1]]]), event[1])
    within_R = _positive(np.minimum(last_R, ends_R) - np.maximum(first_R, starts_R))

    # Left of a flag at p: X is beyond p on the right, or below y - (p - y) on the left.
    low_R, high_R = first_R, np.minimum(last_R, starts_R)
    mirrored_R = starts_R + zone[0]
    left_R = (high_R - low_R) * (zone[1] - starts_R) + (
        _positive(2 * high_R - mirrored_R) ** 2 - _positive(2 * low_R - mirrored_R) ** 2
    ) / 4
    left_R = np.where(high_R > low_R, left_R, 0.0)

    low_R, high_R = np.maximum(first_R, ends_R), last_R
    mirrored_R = ends_R + zone[1]
    right_R = (high_R - low_R) * (ends_R - zone[0]) + (
        _positive(mirrored_R - 2 * low_R) ** 2 - _positive(mirrored_R - 2 * high_R) ** 2
    ) / 4
    right_R = np.where(high_R > low_R, right_R, 0.0)

    total = within_R + (left_R + right_R) / (zone[1] - zone[0])
    return float(total.sum() / (event[1] - event[0]))


def _positive(values: np.ndarray) -> np.ndarray:
    return np.maximum(values, 0.0)
