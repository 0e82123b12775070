"""What known methods reach on the sets of anomaly detection and classification.

Same files, same splits and same measures as `patch_moe.py`. Anomalies: reconstruction by the
principal components that hold 90 % of the variance, and an isolation forest, both of scikit-learn,
fitted to each entity's train part, thresholds from its last fifth. Classes: 1-nearest neighbour by
dynamic time warping (window of 10 %) and MiniRocket, both of aeon, which is not among tsmoe's
dependencies: `pip install aeon`. Cases of unequal length are filled with their last value.

    python benchmarks/task_baselines.py anomaly --data FOLDER
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from patch_moe import SUITES
from record import record
from tsmoe.evaluate.anomaly_metrics import anomaly_scores, threshold_at
from tsmoe.evaluate.protocol import fit_scaler
from tsmoe.tasks.anomaly_data import Entity, read_anomaly_data
from tsmoe.tasks.case_data import CaseSet, read_cases

# As in the preset and its config.
VALIDATION_SHARE, FLAGGED_SHARE = 0.2, 0.01

Scorer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of rows to fit to and rows to score."""


def pca_scores(train_LC: np.ndarray, rows_LC: np.ndarray) -> np.ndarray:
    """Return the squared error of the reconstruction by the first principal components."""
    from sklearn.decomposition import PCA

    model = PCA(n_components=0.9, svd_solver="full").fit(train_LC)
    return np.square(model.inverse_transform(model.transform(rows_LC)) - rows_LC).mean(axis=1)


def forest_scores(train_LC: np.ndarray, rows_LC: np.ndarray) -> np.ndarray:
    """Return how few cuts isolate a row."""
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(random_state=0).fit(train_LC).score_samples(rows_LC)


def filled(values_LC: np.ndarray) -> np.ndarray:
    """Put the mean of the train part, 0, where nothing is recorded."""
    return np.where(np.isfinite(values_LC), values_LC, 0.0)


def lagged(values_LC: np.ndarray, steps: int = 8) -> np.ndarray:
    """Put the last rows of a univariate series side by side: single values teach nothing."""
    if values_LC.shape[1] > 1:
        return values_LC
    padded = np.concatenate((np.repeat(values_LC[:1], steps - 1, axis=0), values_LC))
    return np.lib.stride_tricks.sliding_window_view(padded[:, 0], steps)


def scaled(entity: Entity, path: str) -> tuple[np.ndarray, np.ndarray]:
    """Scale both parts by the train part, without what is labelled there."""
    train_LC = entity.train_LC
    if entity.train_is_anomaly_L is not None:
        train_LC = train_LC[~entity.train_is_anomaly_L]
    is_known_C = np.isfinite(train_LC).any(axis=0)
    names = tuple(f"{place}" for place in np.flatnonzero(is_known_C))
    scaler = fit_scaler(train_LC[:, is_known_C], names, path=path)
    parts = (train_LC[:, is_known_C], entity.test_LC[:, is_known_C])
    train_LC, test_LC = (lagged(filled(scaler.scale(part))) for part in parts)
    return train_LC, test_LC


def anomaly_cell(path: Path, scorer: Scorer) -> dict[str, Any]:
    """Score all entities of a file and judge them as one series."""
    scores, usual, labels = [], [], []
    for entity in read_anomaly_data(path).entities:
        train_LC, test_LC = scaled(entity, str(path))
        border = int(len(train_LC) * (1 - VALIDATION_SHARE))
        found_L = scorer(train_LC[:border], np.concatenate((train_LC[border:], test_LC)))
        usual.append(found_L[: len(train_LC) - border])
        scores.append(found_L[len(train_LC) - border :])
        labels.append(entity.test_is_anomaly_L)
    threshold = threshold_at(np.concatenate(usual), FLAGGED_SHARE)
    found = anomaly_scores(np.concatenate(scores), np.concatenate(labels), threshold=threshold)
    return found.to_json_dict()


def one_length(cases: CaseSet, length: int) -> np.ndarray:
    """Return cases of one length: the end of longer ones, the last value repeated in others."""
    found = []
    for case_CL in cases.values:
        kept_CL = np.nan_to_num(case_CL[:, -length:])
        found.append(np.pad(kept_CL, ((0, 0), (0, length - kept_CL.shape[1])), mode="edge"))
    return np.stack(found).astype(np.float64)


def classification_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Classify the test cases of a file by both methods."""
    from aeon.classification.convolution_based import MiniRocketClassifier
    from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier

    data = read_cases(path)
    # MiniRocket's kernels are 9 points long.
    length = max(9, *(case_CL.shape[1] for case_CL in data.train.values))
    train, test = one_length(data.train, length), one_length(data.test, length)
    methods = {
        "dtw_1nn": KNeighborsTimeSeriesClassifier(
            n_neighbors=1, distance="dtw", distance_params={"window": 0.1}
        ),
        "minirocket": MiniRocketClassifier(random_state=0),
    }
    found = {}
    for name, method in methods.items():
        begun = time.monotonic()
        method.fit(train, data.train.labels)
        accuracy = float((method.predict(test) == data.test.labels).mean())
        found[name] = {"accuracy": accuracy, "seconds": round(time.monotonic() - begun, 1)}
    return found


def main() -> None:
    """Measure all sets of a task."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["anomaly", "classification"])
    parser.add_argument("--data", type=Path, required=True, help="folder with tasks/")
    args = parser.parse_args()
    suite = SUITES[args.task]
    results: dict[str, Any] = {}
    for name in suite.sets:
        path = args.data / suite.folder / f"{name}.parquet"
        if args.task == "anomaly":
            scorers: dict[str, Scorer] = {"pca": pca_scores, "isolation_forest": forest_scores}
            results[name] = {kind: anomaly_cell(path, scorer) for kind, scorer in scorers.items()}
        else:
            results[name] = classification_cells(path)
        record(f"task_baselines_{args.task}", results)


if __name__ == "__main__":
    main()
