"""Telling cases apart by their class.

Shapes: B cases, C variates, L steps, Y classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.heads.task import ClassificationHeadConfig
from tsmoe.tasks.case_data import CaseData, CaseSet, read_cases
from tsmoe.tasks.config import ClassificationTaskConfig, PointLoss
from tsmoe.tasks.predictor import TaskPredictor, fit_length
from tsmoe.tasks.task import MODEL, TaskEvaluation
from tsmoe.tasks.windows import Floats, Integers, generator_of


@dataclass(frozen=True, kw_only=True)
class CaseScaler:
    """Mean and deviation of each variate over the training cases."""

    mean_C: NDArray[np.float64]
    std_C: NDArray[np.float64]

    @classmethod
    def fit(cls, cases: Sequence[Floats]) -> CaseScaler:
        """Fit on what is observed; a variate that is constant or empty keeps its level."""
        joined_CL = np.concatenate(list(cases), axis=1).astype(np.float64)
        is_seen_CL = np.isfinite(joined_CL)
        count_C = np.maximum(is_seen_CL.sum(axis=1), 1)
        mean_C = np.where(is_seen_CL, joined_CL, 0).sum(axis=1) / count_C
        centred_CL = np.where(is_seen_CL, joined_CL - mean_C[:, None], 0)
        std_C = np.sqrt(np.square(centred_CL).sum(axis=1) / count_C)
        return cls(mean_C=mean_C, std_C=np.where(std_C > 0, std_C, 1.0))

    def scale(self, values_CL: Floats) -> Floats:
        """Standardise one case."""
        return ((values_CL - self.mean_C[:, None]) / self.std_C[:, None]).astype(np.float32)


class ClassificationTask:
    """Cases with labels; some of the training cases of each class are kept for validation."""

    loss_of_points: PointLoss = "mse"  # there are none

    def __init__(
        self,
        name: str,
        config: ClassificationTaskConfig,
        path: str,
        *,
        context_length: int,
        patch_length: int,
        seed: int = 0,
        data: CaseData | None = None,
    ) -> None:
        """Read the cases, unless they are given.

        Raises:
            DataError: if a class is too small to be learned and validated, or unknown in training.
        """
        self.name, self.config, self.source = name, config, path
        self.data = data = read_cases(path) if data is None else data
        if config.fits_context:
            longest = max(case_CL.shape[1] for case_CL in data.train.values)
            context_length = -(-longest // patch_length) * patch_length
        self.context_length = context_length
        self.scaler = CaseScaler.fit(data.train.values)
        self._train_BCL = self.windows(data.train)
        self._train_M, self._validation_M = self._share_out(seed)
        self.num_train, self.num_validation = len(self._train_M), len(self._validation_M)
        digest = hashlib.sha256(repr((data.classes, data.train.labels.tolist())).encode())
        digest.update(np.ascontiguousarray(self._train_BCL).tobytes())
        self.fingerprint = digest.hexdigest()

    def head(self) -> ClassificationHeadConfig:
        """Return the head that tells these classes apart."""
        return ClassificationHeadConfig(
            num_classes=len(self.data.classes),
            num_variates=self._train_BCL.shape[1],
            pooling=self.config.pooling,
            dropout=self.config.head_dropout,
        )

    def training_batch(self, items: Integers, positions: Integers) -> WindowBatch:  # noqa: ARG002
        """Return training cases."""
        return self._batch(self._train_M[items])

    def validation_batch(self, places: Integers) -> WindowBatch:
        """Return cases that are kept for validation."""
        return self._batch(self._validation_M[places])

    def series_name(self, number: int) -> str:
        """Name a case."""
        return f"training case {number}"

    def windows(self, cases: CaseSet) -> Floats:
        """Return scaled values_BCL of the model's length; NaN before a short case begins."""
        return np.concatenate(
            [
                fit_length(self.scaler.scale(case_CL)[None], self.context_length)
                for case_CL in cases.values
            ]
        )

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Say what the classes are and how cases are scaled."""
        return {
            "type": "classification",
            "classes": list(self.data.classes),
            "mean": self.scaler.mean_C.tolist(),
            "std": self.scaler.std_C.tolist(),
        }

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Classify the test cases."""
        from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

        logits_BY = predictor.predict(self.windows(self.data.test), self.name)
        predicted_B, truth_B = logits_BY.argmax(axis=1), self.data.test.labels
        most_common = int(np.bincount(self.data.train.labels).argmax())
        results = []
        for model, labels_B in (
            (MODEL, predicted_B),
            ("most_common", np.full_like(truth_B, most_common)),
        ):
            results.append(
                {
                    "model": model,
                    "accuracy": float(accuracy_score(truth_B, labels_B)),
                    "balanced_accuracy": float(balanced_accuracy_score(truth_B, labels_B)),
                    "macro_f1": float(f1_score(truth_B, labels_B, average="macro")),
                }
            )
        return TaskEvaluation(
            task="classification",
            data=self.source,
            facts={
                "context": self.context_length,
                "cases": len(truth_B),
                "classes": len(self.data.classes),
            },
            results=results,
        )

    def _share_out(self, seed: int) -> tuple[Integers, Integers]:
        """Keep some cases of each class for validation, at least one and not all."""
        labels = self.data.train.labels
        train, validation = [], []
        for number, name in enumerate(self.data.classes):
            own = np.flatnonzero(labels == number)
            if len(own) < 2:
                raise DataError(
                    f"{self.source}: class {name!r} has {len(own)} training case; 2 are needed, "
                    "one to learn from and one to validate with"
                )
            kept = min(len(own) - 1, max(1, round(len(own) * self.config.validation_share)))
            own = generator_of(seed, 1, number).permutation(own)
            validation.append(own[:kept])
            train.append(own[kept:])
        return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation))

    def _batch(self, cases_B: Integers) -> WindowBatch:
        values_BCL = self._train_BCL[cases_B]
        is_recorded_BCL = np.isfinite(values_BCL)
        return WindowBatch(
            values_BCL=torch.from_numpy(np.where(is_recorded_BCL, values_BCL, 0)),
            observed_BCL=torch.from_numpy(is_recorded_BCL),
            is_target_BCL=torch.zeros(values_BCL.shape, dtype=torch.bool),
            series_ids_B=torch.from_numpy(np.ascontiguousarray(cases_B)),
            labels_B=torch.from_numpy(self.data.train.labels[cases_B]),
            task=self.name,
        )
