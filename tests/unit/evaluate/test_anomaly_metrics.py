"""Measures of anomaly detection, against hand-computed cases and slow definitions of the same."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from tsmoe.evaluate.affiliation import affiliation
from tsmoe.evaluate.anomaly_metrics import (
    anomaly_scores,
    auc_pr,
    auc_roc,
    point_adjusted_f1,
    threshold_at,
)
from tsmoe.evaluate.vus import vus_roc


def mask(length: int, *events: tuple[int, int]) -> np.ndarray:
    """Mark the steps of [start, end) events."""
    is_true_L = np.zeros(length, dtype=bool)
    for start, end in events:
        is_true_L[start:end] = True
    return is_true_L


def integrated_affiliation(
    is_flagged_L: np.ndarray, is_anomaly_L: np.ndarray, *, points_per_step: int = 20
) -> tuple[float, float]:
    """Compute affiliation from its definition, by counting points of a fine grid."""
    length = len(is_anomaly_L)
    points = (np.arange(length * points_per_step) + 0.5) / points_per_step
    step = points.astype(int)
    anomaly, flagged = is_anomaly_L[step], is_flagged_L[step]
    edges = np.flatnonzero(np.diff(is_anomaly_L.astype(int), prepend=0, append=0)).reshape(-1, 2)
    # A point belongs to the nearest event.
    to_event = np.maximum(np.maximum(edges[:, :1] - points, points - edges[:, 1:]), 0)
    owner = to_event.argmin(axis=0)
    precisions, recalls = [], []
    for a in range(len(edges)):
        in_zone = owner == a
        zone, distance = points[in_zone], to_event[a, in_zone]
        is_flag = flagged[in_zone]
        if not is_flag.any():
            recalls.append(0.0)
            continue
        precisions.append((distance >= distance[is_flag][:, None]).mean())
        event, flags = zone[anomaly[in_zone]], zone[is_flag]
        nearest = np.abs(event[:, None] - flags).min(axis=1)
        recalls.append((np.abs(zone - event[:, None]) >= nearest[:, None]).mean())
    return float(np.mean(precisions)), float(np.mean(recalls))


def test_flagging_exactly_the_anomalies_has_affiliation_of_one() -> None:
    is_anomaly_L = mask(40, (0, 3), (10, 11), (30, 40))
    scores = affiliation(is_anomaly_L.copy(), is_anomaly_L)
    assert (scores.precision, scores.recall, scores.f1) == (1.0, 1.0, 1.0)


def test_affiliation_of_one_step_beside_the_anomaly_is_the_closed_form() -> None:
    # Zone [0, 10), anomaly [4, 6), flag [7, 8). Precision: distances 1..2, both margins are 4 long:
    # 2 * (3^2 - 2^2) / 2 / 10. Recall: y in [4, 6), nearest flag 7: right of it 3, and left of
    # 2y - 7 its length, 0 at y = 4: (2 * 3 + (5^2 - 1^2) / 4) / 10 / 2.
    scores = affiliation(mask(10, (7, 8)), mask(10, (4, 6)))
    assert scores.precision == pytest.approx(0.5)
    assert scores.recall == pytest.approx(0.6)
    assert scores.f1 == pytest.approx(2 * 0.5 * 0.6 / 1.1)


def test_affiliation_agrees_with_the_example_of_the_paper() -> None:
    minutes = mask(180, (0, 10), (50, 70), (170, 175))
    flagged = mask(180, (5, 6), (7, 10), (11, 12), (40, 60), (115, 130), (135, 140), (165, 170))
    # The zone of the second anomaly, [30, 120), alone: the paper gives 0.672 and 0.944.
    scores = affiliation(flagged[30:120], minutes[30:120])
    assert scores.precision == pytest.approx(0.6722222222)
    assert scores.recall == pytest.approx(0.9444444444)


@pytest.mark.parametrize("seed", range(6))
def test_affiliation_agrees_with_numerical_integration(seed: int) -> None:
    generator = np.random.default_rng(seed)
    is_anomaly_L = mask(60, (5, 9), (20, 21), (34, 44))
    is_flagged_L = generator.random(60) < (0.05, 0.15, 0.5)[seed % 3]
    is_flagged_L[generator.integers(60)] = True
    scores = affiliation(is_flagged_L, is_anomaly_L)
    precision, recall = integrated_affiliation(is_flagged_L, is_anomaly_L)
    # The grid has 20 points a step; ties between equal distances are off by one of them.
    assert scores.precision == pytest.approx(precision, abs=3e-3)
    assert scores.recall == pytest.approx(recall, abs=3e-3)


def test_affiliation_falls_as_the_flag_moves_away() -> None:
    is_anomaly_L = mask(100, (48, 52))
    moved = [affiliation(mask(100, (48 + s, 52 + s)), is_anomaly_L) for s in (0, 2, 6, 15, 40)]
    for near, far in pairwise(moved):
        assert near.precision > far.precision
        assert near.recall > far.recall


def test_an_anomaly_without_a_flag_in_its_zone_lowers_recall_only() -> None:
    scores = affiliation(mask(100, (20, 25)), mask(100, (20, 25), (80, 85)))
    assert (scores.precision, scores.recall) == (1.0, 0.5)


def test_no_flag_has_undefined_precision_and_an_f1_of_zero() -> None:
    scores = affiliation(mask(20), mask(20, (5, 8)))
    assert math.isnan(scores.precision)
    assert (scores.recall, scores.f1) == (0.0, 0.0)


def slow_range_auc(scores_L: np.ndarray, is_anomaly_L: np.ndarray, buffer: int) -> float:
    """Compute the area for one buffer, one threshold and one step at a time."""
    edges = np.flatnonzero(np.diff(is_anomaly_L.astype(int), prepend=0, append=0)).reshape(-1, 2)
    labels_L = is_anomaly_L.astype(float)
    for start, end in edges:
        for distance in range(1, buffer // 2 + 1):
            weight = math.sqrt(1 - distance / buffer)
            if start - distance >= 0:
                labels_L[start - distance] += weight
            if end - 1 + distance < len(labels_L) and distance < buffer // 2:
                labels_L[end - 1 + distance] += weight
    labels_L = np.minimum(labels_L, 1)
    wide = np.flatnonzero(np.diff((labels_L > 0).astype(int), prepend=0, append=0)).reshape(-1, 2)
    positives = (is_anomaly_L.sum() + labels_L.sum()) / 2
    curve = [(0.0, 0.0)]
    descending = np.sort(scores_L)[::-1]
    for rank in np.linspace(0, len(scores_L) - 1, 250).astype(int):
        is_flagged_L = scores_L >= descending[rank]
        true = (labels_L * is_flagged_L).sum()
        found = np.mean([is_flagged_L[start:end].any() for start, end in wide])
        false = (is_flagged_L.sum() - true) / (len(scores_L) - positives)
        curve.append((false, min(true / positives, 1) * found))
    curve.append((1.0, 1.0))
    return sum((right[0] - left[0]) * (right[1] + left[1]) / 2 for left, right in pairwise(curve))


@pytest.mark.parametrize("decimals", [6, 1])  # 1: many tied scores
def test_vus_agrees_with_its_definition_step_by_step(decimals: int) -> None:
    generator = np.random.default_rng(3)
    is_anomaly_L = mask(300, (0, 4), (50, 58), (60, 62), (280, 300))  # edges, and merging buffers
    scores_L = generator.random(300) + 0.4 * is_anomaly_L
    scores_L[40:80] /= 4  # these two are found last
    scores_L = np.round(scores_L, decimals)
    expected = np.mean([slow_range_auc(scores_L, is_anomaly_L, buffer) for buffer in range(10)])
    assert vus_roc(scores_L, is_anomaly_L, max_buffer=9) == pytest.approx(expected, abs=1e-12)


def test_vus_is_about_1_if_perfect_a_half_if_random_and_near_0_if_inverted() -> None:
    generator = np.random.default_rng(0)
    is_anomaly_L = mask(10_000, (1000, 1400), (4000, 4500), (8000, 8300))
    noise_L = generator.random(10_000)
    assert vus_roc(is_anomaly_L + 0.1 * noise_L, is_anomaly_L, max_buffer=20) > 0.99
    assert vus_roc(noise_L, is_anomaly_L, max_buffer=20) == pytest.approx(0.5, abs=0.05)
    assert vus_roc(0.1 * noise_L - is_anomaly_L, is_anomaly_L, max_buffer=20) < 0.1


def test_vus_without_buffer_is_the_area_under_the_roc_curve_for_one_anomaly() -> None:
    generator = np.random.default_rng(1)
    is_anomaly_L = mask(2000, (700, 1000))
    scores_L = generator.normal(size=2000) + is_anomaly_L
    area = auc_roc(scores_L, is_anomaly_L)
    # 250 thresholds instead of 2000, and at the first one the anomaly may not be found yet.
    assert vus_roc(scores_L, is_anomaly_L, max_buffer=0) == pytest.approx(area, abs=2e-3)


def test_a_buffer_forgives_scores_that_rise_early() -> None:
    is_anomaly_L = mask(1000, (500, 540))
    early_L = mask(1000, (485, 540)) + 0.1 * np.random.default_rng(2).random(1000)
    late_by_far_L = np.roll(early_L, -200)
    assert vus_roc(early_L, is_anomaly_L, max_buffer=30) > vus_roc(
        early_L, is_anomaly_L, max_buffer=0
    )
    assert vus_roc(late_by_far_L, is_anomaly_L, max_buffer=30) < 0.55


def test_areas_of_a_small_case_are_those_counted_by_hand() -> None:
    scores_L = np.array([0.1, 0.4, 0.35, 0.8])
    is_anomaly_L = np.array([False, False, True, True])
    assert auc_roc(scores_L, is_anomaly_L) == pytest.approx(3 / 4)  # one of four pairs is wrong
    assert auc_pr(scores_L, is_anomaly_L) == pytest.approx((1 + 2 / 3) / 2)


def test_point_adjustment_turns_one_flag_into_a_whole_event() -> None:
    is_anomaly_L = mask(20, (5, 15))
    is_flagged_L = mask(20, (9, 10), (0, 1))
    # 10 steps are found, 1 is wrong, none is missed; unadjusted it is 2 * 1 / (2 + 1 + 9).
    assert point_adjusted_f1(is_flagged_L, is_anomaly_L) == pytest.approx(20 / 21)
    assert point_adjusted_f1(mask(20, (0, 1)), is_anomaly_L) == 0.0


def test_point_adjustment_flatters_a_random_detector() -> None:
    is_anomaly_L = mask(10_000, (1000, 2000), (5000, 6000))
    is_flagged_L = np.random.default_rng(0).random(10_000) < 0.01
    assert point_adjusted_f1(is_flagged_L, is_anomaly_L) > 0.9
    assert affiliation(is_flagged_L, is_anomaly_L).precision < 0.7


def test_threshold_flags_the_asked_share_of_the_train_part() -> None:
    scores_L = np.random.default_rng(0).normal(size=1000)
    assert (scores_L > threshold_at(scores_L, 0.02)).sum() == 20


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"share must lie between 0 and 1.*{share}"):
        threshold_at(np.ones(3), share)


def test_a_threshold_of_empty_or_broken_scores_is_refused() -> None:
    with pytest.raises(ValueError, match="scores_train_L is empty"):
        threshold_at(np.array([]), 0.1)
    with pytest.raises(ValueError, match="2 of 4 scores are not finite, the first at step 1"):
        threshold_at(np.array([0.0, np.nan, 1.0, np.inf]), 0.1)


def test_all_measures_of_a_series_are_finite_and_belong_to_the_threshold() -> None:
    is_anomaly_L = mask(500, (200, 230), (400, 410))
    scores_L = 0.5 * np.random.default_rng(0).random(500) + is_anomaly_L
    scores = anomaly_scores(scores_L, is_anomaly_L, threshold=0.7)
    assert (scores.auc_roc, scores.auc_pr) == (1.0, 1.0)
    assert (scores.affiliation_f1, scores.point_adjusted_f1) == (1.0, 1.0)
    assert scores.flagged_fraction == 40 / 500
    assert scores.threshold == 0.7
    assert all(math.isfinite(value) for value in scores.to_json_dict().values())  # type: ignore[arg-type]


def test_an_undefined_precision_is_null_in_json() -> None:
    scores_L = np.linspace(0, 1, 50)
    written = anomaly_scores(scores_L, mask(50, (40, 45)), threshold=1.0).to_json_dict()
    assert written["flagged_fraction"] == 0.0  # equal to the threshold is not flagged
    assert written["affiliation_precision"] is None
    assert written["affiliation_f1"] == 0.0
    json.dumps(written, allow_nan=False)


def test_labels_of_one_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="30 steps and no step is an anomaly"):
        anomaly_scores(np.zeros(30), mask(30), threshold=0.5)
    with pytest.raises(ValueError, match="30 steps and all steps are an anomaly"):
        anomaly_scores(np.zeros(30), ~mask(30), threshold=0.5)


def test_unequal_lengths_are_refused_with_both_lengths() -> None:
    with pytest.raises(ValueError, match=r"scores_L \(29,\) and is_anomaly_L \(30,\)"):
        anomaly_scores(np.zeros(29), mask(30, (1, 2)), threshold=0.5)


def test_broken_scores_are_counted_and_located() -> None:
    scores_L = np.zeros(30)
    scores_L[[7, 9]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 30 scores are not finite, the first at step 7"):
        anomaly_scores(scores_L, mask(30, (1, 2)), threshold=0.5)
    with pytest.raises(ValueError, match="threshold must be finite, got nan"):
        anomaly_scores(np.zeros(30), mask(30, (1, 2)), threshold=float("nan"))


def test_scores_in_the_place_of_flags_and_numbers_in_that_of_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="is_flagged_L must be of bool, got float64"):
        affiliation(np.linspace(0, 1, 30), mask(30, (1, 2)))
    with pytest.raises(ValueError, match="is_flagged_L must be of bool, got float64"):
        point_adjusted_f1(np.linspace(0, 1, 30), mask(30, (1, 2)))
    with pytest.raises(ValueError, match="is_anomaly_L must be of bool, got int64"):
        vus_roc(np.zeros(30), mask(30, (1, 2)).astype(np.int64))


def test_a_negative_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="max_buffer must be 0 or more steps, got -1"):
        vus_roc(np.zeros(30), mask(30, (1, 2)), max_buffer=-1)
