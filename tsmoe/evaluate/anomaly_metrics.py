"""Measures of anomaly detection in one series: some of the scores, some of flags at a threshold.

Scores are higher where a step is more anomalous; a step is flagged where its score is greater than
a threshold that was chosen on the train part. Affiliation and the volume under the surface stand
in files of their own.

Shapes: L steps.
"""

import math
from dataclasses import asdict, dataclass

import numpy as np

from tsmoe.evaluate.affiliation import affiliation
from tsmoe.evaluate.anomaly_events import check_finite, check_flags, check_scores, find_events
from tsmoe.evaluate.vus import vus_roc


@dataclass(frozen=True, kw_only=True)
class AnomalyScores:
    """How well one detector found the anomalies of one series."""

    auc_roc: float
    auc_pr: float
    """Average precision; a random score has about the share of anomalous steps."""
    affiliation_precision: float
    """NaN where nothing is flagged."""
    affiliation_recall: float
    affiliation_f1: float
    vus_roc: float
    """With the default buffer of `vus_roc`."""
    point_adjusted_f1: float
    """Inflated, for comparison with papers only; see the function of this name."""
    flagged_fraction: float
    """Share of the steps that are flagged."""
    threshold: float
    """Steps with a greater score are flagged."""

    def to_json_dict(self) -> dict[str, float | None]:
        """Name the measures as in every result file; None where one is not finite."""
        return {
            name: value if math.isfinite(value) else None for name, value in asdict(self).items()
        }


def anomaly_scores(
    scores_L: np.ndarray, is_anomaly_L: np.ndarray, *, threshold: float
) -> AnomalyScores:
    """Compute every measure of one series.

    Args:
        threshold: from `threshold_at` on the train part, never from these scores.

    Raises:
        ValueError: if the lengths differ, the labels are no bool, no step or every step is an
            anomaly, or a score or the threshold is not finite.
    """
    check_scores(scores_L, is_anomaly_L)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}; take it from threshold_at")
    is_flagged_L = scores_L > threshold
    near = affiliation(is_flagged_L, is_anomaly_L)
    return AnomalyScores(
        auc_roc=auc_roc(scores_L, is_anomaly_L),
        auc_pr=auc_pr(scores_L, is_anomaly_L),
        affiliation_precision=near.precision,
        affiliation_recall=near.recall,
        affiliation_f1=near.f1,
        vus_roc=vus_roc(scores_L, is_anomaly_L),
        point_adjusted_f1=point_adjusted_f1(is_flagged_L, is_anomaly_L),
        flagged_fraction=float(is_flagged_L.mean()),
        threshold=float(threshold),
    )


def threshold_at(scores_train_L: np.ndarray, share: float) -> float:
    """Choose the threshold that flags about this share of the train part.

    Scores must come from the train part: a threshold from the test part knows how many anomalies
    to expect. Where many scores are equal, fewer steps than asked are greater than it.

    Args:
        share: between 0 and 1, exclusive.

    Returns:
        The (1 - share) quantile, linear between scores.

    Raises:
        ValueError: if the share is out of range, or scores are missing or not finite.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, exclusive, got {share}")
    if scores_train_L.size == 0:
        raise ValueError("scores_train_L is empty; score the train part first")
    check_finite(scores_train_L, name="scores_train_L")
    return float(np.quantile(scores_train_L, 1 - share))


def auc_roc(scores_L: np.ndarray, is_anomaly_L: np.ndarray) -> float:
    """Compute the area under the ROC curve: the chance that an anomalous step scores higher.

    Raises:
        ValueError: as in `anomaly_scores`.
    """
    from sklearn.metrics import roc_auc_score

    check_scores(scores_L, is_anomaly_L)
    return float(roc_auc_score(is_anomaly_L, scores_L))


def auc_pr(scores_L: np.ndarray, is_anomaly_L: np.ndarray) -> float:
    """Compute the average precision, the step-wise area under the precision-recall curve.

    Raises:
        ValueError: as in `anomaly_scores`.
    """
    from sklearn.metrics import average_precision_score

    check_scores(scores_L, is_anomaly_L)
    return float(average_precision_score(is_anomaly_L, scores_L))


def point_adjusted_f1(is_flagged_L: np.ndarray, is_anomaly_L: np.ndarray) -> float:
    """Compute F1 after one flag in an anomaly is taken to have found all of its steps.

    Inflated: a random score reaches high values where anomalies are long, since one lucky flag
    gains the whole event and a wrong one costs a step. For comparison with papers that report it,
    never to choose a model.

    Raises:
        ValueError: if the lengths differ, a mask is no bool, or no step or every step is an
            anomaly.

    Source: the criticism is Kim et al. 2022 (arXiv 2109.05257), section 3.
    """
    check_flags(is_flagged_L, is_anomaly_L)
    starts, ends = find_events(is_anomaly_L)
    flags_before = np.concatenate([[0], np.cumsum(is_flagged_L)])
    is_found = flags_before[ends] > flags_before[starts]
    true_positives = int((ends - starts)[is_found].sum())
    false_positives = int((is_flagged_L & ~is_anomaly_L).sum())
    false_negatives = int(is_anomaly_L.sum()) - true_positives
    return 2 * true_positives / (2 * true_positives + false_positives + false_negatives)
