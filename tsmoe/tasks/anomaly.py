"""Anomaly detection: what a model of the usual cannot reconstruct is unusual.

Shapes: B windows, C variates, L rows of a recording, W steps of a window, N patches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsmoe.batch import WindowBatch
from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.anomaly_metrics import anomaly_scores, auc_roc, threshold_at
from tsmoe.evaluate.protocol import Scaler, fit_scaler
from tsmoe.heads.task import ReconstructionHeadConfig
from tsmoe.tasks.anomaly_data import AnomalyData, Entity, labelled_in_train, read_anomaly_data
from tsmoe.tasks.config import AnomalyTaskConfig
from tsmoe.tasks.predictor import TaskPredictor
from tsmoe.tasks.task import MODEL, TaskEvaluation
from tsmoe.tasks.windows import (
    Floats,
    Integers,
    WindowStore,
    bounded,
    generator_of,
    points_batch,
)

# What random numbers are drawn for.
_TRAINING, _VALIDATION = 1, 2
_INFLATED = (
    "point_adjusted_f1 counts an anomaly as found whole by any of its points, so that random "
    "scores do well too (arXiv 2109.05257): for comparison with papers only"
)
# Training windows begin at every row, validation windows such a part of a window further.
_VALIDATION_STRIDES = 4


class AnomalyTask:
    """One model for all entities of a file, each scaled by its own train part.

    Source: TAB and CATCH (METHODS of their papers): trained on the train part, each point scored by
    its reconstruction error, nothing adjusted.
    """

    def __init__(
        self,
        name: str,
        config: AnomalyTaskConfig,
        path: str,
        *,
        context_length: int,
        patch_length: int,
        seed: int = 0,
        data: AnomalyData | None = None,
    ) -> None:
        """Read the entities, unless they are given.

        Raises:
            DataError: if the train part holds labelled anomalies that are not to be left out, or is
                too short.
        """
        self.name, self.config, self.source, self.seed = name, config, path, seed
        self.context_length, self.patch_length = context_length, patch_length
        self.loss_of_points = config.loss
        if data is None:
            data = read_anomaly_data(
                path,
                entity_column=config.entity_column,
                label_column=config.label_column,
                split_column=config.split_column,
                time_column=config.time_column,
                train_share=config.train_share,
            )
            if not any(entity.test_is_anomaly_L.any() for entity in data.entities):
                raise DataError(
                    f"{path}: no row of the test part is labelled as an anomaly, so there is "
                    "nothing to judge a detector by; label some, or give another split"
                )
        self.data = data
        labelled = labelled_in_train(self.data)
        if labelled and not config.leaves_out_labelled:
            raise DataError(
                f"{path}: {labelled} rows of the train part are labelled as anomalies, which would "
                f"be learned as usual; set tasks.{name}.leaves_out_labelled=true to learn from the "
                "other rows alone, or give a train part without them"
            )
        num_patches = -(-context_length // patch_length)
        if config.hidden_share and round(1 / config.hidden_share) > num_patches:
            raise ConfigError(
                f"tasks.{name}.hidden_share ({config.hidden_share}) of a window's {num_patches} "
                f"patches hides none; use {1 / num_patches:.2g} or more, or 0"
            )
        scaled = [self._scale(entity) for entity in self.data.entities]
        self._scaled = [parts for parts, _ in scaled]
        self.scalers = [scaler for _, scaler in scaled]
        """Of each entity; a variate of which nothing is known has NaN there."""
        trains = [train_LC for train_LC, _ in self._scaled]
        self._store = WindowStore(trains, lead=context_length)
        train, validation = [], []
        self._borders_M: list[int] = []
        """Of each validation window: the row of the store from which on it validates."""
        for number, train_LC in enumerate(trains):
            border = int(len(train_LC) * (1 - config.validation_share))
            train.append(self._starts(number, 0, border, step=1))
            validation.append(self._validation_starts(number, border, len(train_LC)))
            self._borders_M += [self._store.offsets[number] + border] * len(validation[-1])
        self._train_M = self._recorded(np.concatenate(train))
        self._validation_M = np.concatenate(validation)
        self.num_train, self.num_validation = len(self._train_M), len(self._validation_M)
        if not self.num_train or not self.num_validation:
            raise DataError(f"{path}: nothing is recorded in the train part; there must be values")
        self.fingerprint = self._store.fingerprint

    def head(self) -> ReconstructionHeadConfig:
        """Return the head that gives the points of each patch."""
        return ReconstructionHeadConfig()

    def training_batch(self, items: Integers, positions: Integers) -> WindowBatch:
        """Cut training windows; patches that are hidden are drawn anew for each position."""
        return self._batch(
            self._train_M[items], [(_TRAINING, int(position)) for position in positions]
        )

    def validation_batch(self, places: Integers) -> WindowBatch:
        """Cut validation windows; the same patches are hidden each time."""
        starts_B = self._validation_M[places]
        batch = self._batch(starts_B, [(_VALIDATION, int(place)) for place in places])
        # A window that begins before the validation part shows rows that were learned from.
        first_B = np.asarray(self._borders_M)[places] - starts_B
        is_own_BL = np.arange(self.context_length) >= first_B[:, None]
        is_target_BCL = batch.is_target_BCL & torch.from_numpy(is_own_BL)[:, None]
        return replace(batch, is_target_BCL=is_target_BCL)

    def series_name(self, number: int) -> str:
        """Name an entity."""
        return self.data.entities[number].name

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:
        """Say what is watched, and how scores are made."""
        learned = {} if predictor is None else {"threshold": self.threshold(predictor)}
        return {
            "type": "anomaly",
            "variates": list(self.data.variates),
            "hidden_share": self.config.hidden_share,
            "flagged_share": self.config.flagged_share,
            "entities": {
                entity.name: {"mean": _as_json(scaler.mean_C), "std": _as_json(scaler.std_C)}
                for entity, scaler in zip(self.data.entities, self.scalers, strict=True)
            },
            "entity_column": self.data.entity_column,
            "time_column": self.data.time_column,
            **learned,
        }

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Score each point of the test parts; the threshold is of the validation parts.

        All entities count as one series (`tsmoe`); `entities` holds the AUC-ROC of those that have
        both kinds of points.

        Raises:
            DataError: if no point of the test parts is labelled.
        """
        found, labels = [], []
        by_entity: dict[str, float | None] = {}
        for entity, (_, test_LC) in zip(self.data.entities, self._scaled, strict=True):
            # A row of which nothing is recorded is no more unusual than any other.
            scores_L = np.nan_to_num(self.scores(predictor, test_LC), nan=0.0)
            is_anomaly_L = entity.test_is_anomaly_L
            found.append(scores_L)
            labels.append(is_anomaly_L)
            has_both = is_anomaly_L.any() and not is_anomaly_L.all()
            by_entity[entity.name] = auc_roc(scores_L, is_anomaly_L) if has_both else None
        threshold = self.threshold(predictor)
        row = score_row(
            MODEL, np.concatenate(found), np.concatenate(labels), threshold, self.source
        )
        known = [value for value in by_entity.values() if value is not None]
        row["mean_entity_auc_roc"] = math.fsum(known) / len(known) if known else None
        return TaskEvaluation(
            task="anomaly",
            data=self.source,
            facts={
                "context": self.context_length,
                "points": sum(map(len, found)),
                "entities_of_test": len(found),
            },
            results=[row],
            tables={"entities": by_entity},
            notes=(_INFLATED,),
        )

    def scores(self, predictor: TaskPredictor, values_LC: Floats) -> NDArray[np.float64]:
        """Return the score of each row of a recording; see `reconstruction_scores`."""
        return reconstruction_scores(
            predictor,
            self.name,
            values_LC,
            patch_length=self.patch_length,
            hidden_share=self.config.hidden_share,
        )

    def threshold(self, predictor: TaskPredictor) -> float:
        """Choose the threshold by the scores of the validation parts.

        Raises:
            DataError: if nothing is recorded there, or a score is not finite.
        """
        found = []
        for train_LC, _ in self._scaled:
            border = int(len(train_LC) * (1 - self.config.validation_share))
            found.append(self.scores(predictor, train_LC[border:]))
        usual_L = np.concatenate(found)
        try:
            return threshold_at(usual_L[~np.isnan(usual_L)], self.config.flagged_share)
        except ValueError as error:
            raise DataError(f"{self.source}, validation part: {error}") from error

    def _scale(self, entity: Entity) -> tuple[tuple[Floats, Floats], Scaler]:
        train_LC = entity.train_LC
        if entity.train_is_anomaly_L is not None:
            train_LC = np.where(entity.train_is_anomaly_L[:, None], np.nan, train_LC)
        # A variate of which one entity records nothing stays empty there.
        is_known_C = np.isfinite(train_LC).any(axis=0)
        if not is_known_C.any():
            raise DataError(
                f"{self.source}, entity {entity.name}: nothing is recorded in its train part; "
                "leave the entity out"
            )
        names = tuple(
            name for name, is_known in zip(self.data.variates, is_known_C, strict=True) if is_known
        )
        where = f"{self.source}, entity {entity.name}"
        scaler = fit_scaler(train_LC[:, is_known_C], names, path=where)
        mean_C, std_C = (np.full(len(is_known_C), np.nan) for _ in range(2))
        mean_C[is_known_C], std_C[is_known_C] = scaler.mean_C, scaler.std_C
        whole = Scaler(mean_C=mean_C, std_C=std_C)
        parts = [bounded((part - mean_C) / std_C) for part in (train_LC, entity.test_LC)]
        return (parts[0], parts[1]), whole

    def _starts(self, number: int, first: int, end: int, *, step: int) -> Integers:
        """Return windows that end in some rows; a part shorter than a window gives one."""
        last = end - self.context_length
        return self._store.starts(number, min(first, last), last, step=step)

    def _validation_starts(self, number: int, border: int, end: int) -> Integers:
        """Return overlapping windows over the validation part; the last one ends with it."""
        step = max(1, self.context_length // _VALIDATION_STRIDES)
        last = end - self.context_length
        count = -(-max(0, last - border) // step)  # the first one holds the border
        return self._store.offsets[number] + last - step * np.arange(count, -1, -1, dtype=np.int64)

    def _recorded(self, starts_M: Integers) -> Integers:
        recorded_M = self._store.count_recorded(starts_M, 0, self.context_length)
        return starts_M[recorded_M > 0]

    def _batch(self, starts_B: Integers, places: list[tuple[int, int]]) -> WindowBatch:
        values_BCW = self._store.cut(starts_B, self.context_length)
        shown_BCW = np.ones(values_BCW.shape, bool)
        target_BCW = shown_BCW
        if self.config.hidden_share:
            patches = -(-self.context_length // self.patch_length)
            hidden_BCN = np.stack(
                [
                    generator_of(self.seed, *place).random((values_BCW.shape[1], patches))
                    < self.config.hidden_share
                    for place in places
                ]
            )
            # Patches end with the window, as the model cuts them.
            target_BCW = hidden_BCN.repeat(self.patch_length, axis=-1)[..., -self.context_length :]
            shown_BCW = ~target_BCW
        ends_B = starts_B + self.context_length - 1
        return points_batch(
            values_BCW,
            shown_BCW=shown_BCW,
            target_BCW=target_BCW,
            ids_B=np.array([self._store.segment_of(int(end)) for end in ends_B]),
            task=self.name,
        )


def _as_json(numbers_C: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as JSON has them: None for NaN."""
    return [None if math.isnan(number) else number for number in numbers_C.tolist()]


def reconstruction_scores(
    predictor: TaskPredictor,
    task: str,
    values_LC: Floats,
    *,
    patch_length: int,
    hidden_share: float,
) -> NDArray[np.float64]:
    """Return the squared error of the reconstruction of each row, averaged over variates.

    Windows follow one another without overlap and end at the last row. With patches hidden in
    training, each is reconstructed from others: patches are hidden in turns, that share of them in
    each. A row of which nothing is recorded has no score: NaN.
    """
    context, length = predictor.context_length, len(values_LC)
    count = -(-length // context)
    padded_LC = np.pad(values_LC, ((count * context - length, 0), (0, 0)), constant_values=np.nan)
    values_BCL = padded_LC.reshape(count, context, -1).transpose(0, 2, 1)
    errors_BCL = np.zeros(values_BCL.shape)
    for hidden_L in _turns(context, patch_length, hidden_share):
        shown_BCL = np.broadcast_to(~hidden_L, values_BCL.shape)
        points_BCL = predictor.predict(values_BCL, task, shown_BCL=shown_BCL)
        is_scored_L = hidden_L if hidden_share else ~hidden_L
        difference = (points_BCL - values_BCL)[..., is_scored_L].astype(np.float64)
        errors_BCL[..., is_scored_L] = np.square(difference)
    errors_LC = errors_BCL.transpose(0, 2, 1).reshape(-1, values_BCL.shape[1])[-length:]
    is_recorded_LC = np.isfinite(values_LC)
    total_L = np.where(is_recorded_LC, errors_LC, 0).sum(axis=1)
    count_L = is_recorded_LC.sum(axis=1)
    return np.where(count_L > 0, total_L / np.maximum(count_L, 1), np.nan)


def _turns(length: int, patch_length: int, hidden_share: float) -> Sequence[NDArray[np.bool_]]:
    """Return what is hidden in each pass over a window; every point once, or none at all."""
    if not hidden_share:
        return [np.zeros(length, bool)]
    turns = max(2, round(1 / hidden_share))
    # Counted from the end, with which patches end.
    patch_L = np.arange(length)[::-1] // patch_length
    return [patch_L % turns == turn for turn in range(turns)]


def score_row(
    model: str,
    scores_L: NDArray[np.float64],
    is_anomaly_L: NDArray[np.bool_],
    threshold: float,
    source: str,
) -> dict[str, Any]:
    """Return the figures of one detector.

    Raises:
        DataError: if there is nothing to compare with.
    """
    try:
        scores = anomaly_scores(scores_L, is_anomaly_L, threshold=threshold)
    except ValueError as error:
        raise DataError(f"{source}, test part: {error}") from error
    return {"model": model, **scores.to_json_dict()}
