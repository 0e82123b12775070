"""PatchMoE in the way of scikit-learn: `fit`, `predict`, `score` on arrays.

Shapes: B cases, C variates, L steps, Q prediction steps. Arrays of users have steps first: (L, C).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError

from data_pipeline.table import Table
from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.anomaly_metrics import auc_roc, threshold_at
from tsmoe.evaluate.protocol import Scaler
from tsmoe.inference import choose_device
from tsmoe.tasks.anomaly import AnomalyTask
from tsmoe.tasks.anomaly_data import AnomalyData, Entity
from tsmoe.tasks.case_data import CaseData, cases_from_arrays
from tsmoe.tasks.classification import ClassificationTask
from tsmoe.tasks.config import (
    AnomalyTaskConfig,
    ClassificationTaskConfig,
    ForecastTaskConfig,
    ImputationTaskConfig,
    TaskRunConfig,
    resolve_tasks,
)
from tsmoe.tasks.forecast import TableForecastTask
from tsmoe.tasks.imputation import ImputationTask, draw_mask
from tsmoe.tasks.predictor import Floats, TaskForecaster, TaskPredictor
from tsmoe.tasks.run import train_tasks
from tsmoe.tasks.task import Task
from tsmoe.tasks.windows import generator_of
from tsmoe.train.run_config import FINE_TUNING, read_preset

logger = logging.getLogger(__name__)

_ARRAY = "X"
# Windows that pass the model together.
_BLOCK = 256


class _TaskEstimator(BaseEstimator):
    """What all estimators share: settings, the run, and what is known after fitting."""

    _preset = ""
    _task = ""

    def __init__(
        self,
        settings: Sequence[str] = (),
        *,
        run: str | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        """Keep the settings; nothing is done before `fit`.

        Args:
            settings: `KEY=VALUE` over the preset, such as `training.steps=300`.
            run: folder to keep the run in; None: a temporary one, removed after fitting.
            seed: of weights and of the order of windows.
            device: `auto`, `cpu` or `cuda`.
        """
        self.settings = settings
        self.run = run
        self.seed = seed
        self.device = device

    def _config(self, folder: str) -> TaskRunConfig:
        preset = read_preset(self._preset, FINE_TUNING)
        given = [*self.settings, f"run={folder}", f"data={_ARRAY}", f"seed={self.seed}",
                 f"training.device={self.device}"]  # fmt: skip
        return resolve_tasks(preset, self._preset, given)

    def _fit(self, make_task: Any) -> Self:  # a function of a TaskRunConfig
        with tempfile.TemporaryDirectory(prefix="tsmoe-") as temporary:
            config = self._config(str(Path(temporary) / "run") if self.run is None else self.run)
            task: Task = make_task(config)
            _, result = train_tasks(config, {self._task: task}, evaluates=False)
        assert result is not None, "one process: it is the first"
        card = {"tasks": {self._task: task.card()}}
        self.task_ = task
        self.predictor_ = TaskPredictor(result.model, card, choose_device(self.device))
        self.best_step_ = result.best_step
        return self

    def _fitted(self) -> TaskPredictor:
        if not hasattr(self, "predictor_"):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet; call fit before asking it anything"
            )
        return self.predictor_


class PatchMoEForecaster(_TaskEstimator):
    """Forecasts the variates of a table; `fit` takes it in the order of time.

    The last fifth of the rows validates. All steps of the horizon come at once
    (`tasks.forecast.prediction_length`).
    """

    _preset, _task = "patch_moe_forecast", "forecast"

    def fit(self, X: Any, y: None = None) -> Self:  # noqa: ARG002
        """Learn from an array (L, C) or (L,); NaN where not observed.

        Raises:
            DataError: if it is too short, or nothing is observed of a variate.
        """
        table = _table(X)

        def make_task(config: TaskRunConfig) -> TableForecastTask:
            task = config.tasks[self._task]
            assert isinstance(task, ForecastTaskConfig)
            return TableForecastTask(
                self._task,
                _with_all_rows(task, len(table.values_LC)),
                _ARRAY,
                context_length=config.model.context_length,
                table=table,
            )

        self._fit(make_task)
        self._last_CL = table.values_LC[-self.predictor_.context_length :].T
        return self

    def predict(self, X: Any = None) -> Floats:
        """Return forecast (Q, C) of what follows the rows of X, or those that were learned from."""
        predictor = self._fitted()
        context_CL = self._last_CL if X is None else _table(X).values_LC.T
        scaler = _scaler(self.task_)
        _check_variates(context_CL, len(scaler.mean_C))
        scaled_CL = scaler.scale(context_CL.T).T
        forecaster = TaskForecaster(predictor, self._task)
        mean_CQ = forecaster.forecast(scaled_CL, forecaster.prediction_length).mean_BCQ[0]
        return scaler.unscale(mean_CQ).T

    def score(self, X: Any, y: None = None) -> float:  # noqa: ARG002
        """Return the negative mean squared error over all windows of X, scaled as in fitting."""
        predictor = self._fitted()
        scaler = _scaler(self.task_)
        scaled_LC = scaler.scale(_table(X).values_LC)
        forecaster = TaskForecaster(predictor, self._task)
        context, horizon = predictor.context_length, forecaster.prediction_length
        if len(scaled_LC) < context + horizon:
            raise DataError(
                f"X has {len(scaled_LC)} rows; a window takes {context + horizon} (context "
                f"{context}, horizon {horizon})"
            )
        windows_BCW = np.lib.stride_tricks.sliding_window_view(scaled_LC, context + horizon, axis=0)
        total, count = 0.0, 0
        for first in range(0, len(windows_BCW), _BLOCK):
            block = windows_BCW[first : first + _BLOCK]
            mean_BCQ = forecaster.forecast_batch(block[..., :context], horizon).mean_BCQ
            error = (mean_BCQ - block[..., context:]).astype(np.float64)
            total += float(np.nansum(np.square(error)))
            count += int(np.isfinite(error).sum())
        if not count:
            raise DataError("X: no value is observed in the steps to forecast")
        return -total / count


class PatchMoEImputer(_TaskEstimator):
    """Fills what is missing of a table; `fit` takes it in the order of time, with its gaps."""

    _preset, _task = "patch_moe_imputation", "imputation"

    def fit(self, X: Any, y: None = None) -> Self:  # noqa: ARG002
        """Learn from an array (L, C) or (L,); NaN where not observed.

        Raises:
            DataError: if it is too short, or nothing is observed of a variate.
        """
        table = _table(X)

        def make_task(config: TaskRunConfig) -> ImputationTask:
            task = config.tasks[self._task]
            assert isinstance(task, ImputationTaskConfig)
            return ImputationTask(
                self._task,
                _with_all_rows(task, len(table.values_LC)),
                _ARRAY,
                context_length=config.model.context_length,
                seed=config.seed,
                table=table,
            )

        return self._fit(make_task)

    def transform(self, X: Any) -> Floats:
        """Return the table with every NaN filled; what is observed stays as it is.

        Raises:
            DataError: if nothing of a variate is observed.
        """
        predictor = self._fitted()
        values_LC = _table(X).values_LC
        scaler = _scaler(self.task_)
        _check_variates(values_LC.T, len(scaler.mean_C))
        is_empty_C = ~np.isfinite(values_LC).any(axis=0)
        if is_empty_C.any():
            raise DataError(
                f"X: all points of variate {int(is_empty_C.argmax())} are missing, so there is "
                "nothing to fill them from; leave it out or give rows with values"
            )
        filled_LC = self._filled(predictor, scaler.scale(values_LC))
        return np.where(np.isfinite(values_LC), values_LC, scaler.unscale(filled_LC.T).T)

    predict = transform

    def score(self, X: Any, y: None = None, *, share: float = 0.25) -> float:  # noqa: ARG002
        """Hide a share of the points; return the negative mean squared error on them, scaled."""
        predictor = self._fitted()
        scaled_LC = _scaler(self.task_).scale(_table(X).values_LC)
        hidden_LC = draw_mask(scaled_LC.shape, "points", share, 1, generator_of(self.seed, 4))
        filled_LC = self._filled(predictor, np.where(hidden_LC, np.nan, scaled_LC))
        error = (filled_LC - scaled_LC)[hidden_LC & np.isfinite(scaled_LC)].astype(np.float64)
        if not len(error):
            raise DataError(f"X: share={share} hides no observed value; give more rows")
        return -float(np.square(error).mean())

    def _filled(self, predictor: TaskPredictor, scaled_LC: Floats) -> Floats:
        """Reconstruct window after window; the first begins before the table where it must."""
        context, length = predictor.context_length, len(scaled_LC)
        count = -(-length // context)
        padded_LC = np.pad(
            scaled_LC, ((count * context - length, 0), (0, 0)), constant_values=np.nan
        )
        windows_BCL = padded_LC.reshape(count, context, -1).transpose(0, 2, 1)
        points_BCL = predictor.predict(windows_BCL, self._task)
        return points_BCL.transpose(0, 2, 1).reshape(-1, scaled_LC.shape[1])[-length:]


class PatchMoEAnomalyDetector(_TaskEstimator):
    """Learns what is usual, and says how unusual each row is.

    As scikit-learn's outlier detectors: `predict` gives -1 for anomalies and 1 for others, the
    higher `decision_function` and `score_samples`, the more usual a row.
    """

    _preset, _task = "patch_moe_anomaly", "anomaly"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from rows (L, C) or (L,); those that `y` marks with 1 or True are left out."""
        values_LC = _table(X).values_LC
        is_anomaly_L = np.zeros(len(values_LC), bool) if y is None else _flags(y, len(values_LC))
        values_LC = np.where(is_anomaly_L[:, None], np.nan, values_LC)
        entity = Entity(
            name=_ARRAY,
            train_LC=values_LC,
            train_is_anomaly_L=None,
            test_LC=values_LC[:1],
            test_is_anomaly_L=np.zeros(1, bool),
        )
        names = tuple(f"variate {place}" for place in range(values_LC.shape[1]))
        data = AnomalyData(path=_ARRAY, variates=names, entities=(entity,))

        def make_task(config: TaskRunConfig) -> AnomalyTask:
            task = config.tasks[self._task]
            assert isinstance(task, AnomalyTaskConfig)
            return AnomalyTask(
                self._task,
                task,
                _ARRAY,
                context_length=config.model.context_length,
                patch_length=config.model.patch_length,
                seed=config.seed,
                data=data,
            )

        self._fit(make_task)
        task = self._anomaly_task()
        usual_L = task.usual_scores(self.predictor_)
        self.threshold_ = threshold_at(usual_L, task.config.flagged_share)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the negative reconstruction error of each row."""
        predictor, task = self._fitted(), self._anomaly_task()
        values_LC = _table(X).values_LC
        _check_variates(values_LC.T, len(task.scalers[0].mean_C))
        return -task.scores(predictor, task.scalers[0].scale(values_LC))

    def decision_function(self, X: Any) -> np.ndarray:
        """Return `score_samples` above the threshold; negative for anomalies."""
        return self.score_samples(X) + self.threshold_

    def predict(self, X: Any) -> np.ndarray:
        """Return -1 for anomalies and 1 for other rows."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def score(self, X: Any, y: Any) -> float:
        """Return the AUC-ROC of the scores; `y` has 1 or True for anomalies."""
        self._fitted()
        scores_L = -self.score_samples(X)
        try:
            return auc_roc(scores_L, _flags(y, len(scores_L)))
        except ValueError as error:
            raise DataError(f"y: {error}") from error

    def _anomaly_task(self) -> AnomalyTask:
        self._fitted()
        assert isinstance(self.task_, AnomalyTask)
        return self.task_


class PatchMoEClassifier(ClassifierMixin, _TaskEstimator):
    """Tells cases apart: an array (B, C, L) or (B, L), or a list of arrays (C, L)."""

    _preset, _task = "patch_moe_classification", "classification"

    def fit(self, X: Any, y: Any) -> Self:
        """Learn from cases and their classes.

        Raises:
            DataError: for a single class, cases that do not fit one another, or too few of a class.
        """
        if y is None:
            raise DataError("y is missing: give the class of each case")
        cases, classes = cases_from_arrays(X, y)
        names = tuple(str(name) for name in classes)
        data = CaseData(path=_ARRAY, classes=names, train=cases, test=cases)

        def make_task(config: TaskRunConfig) -> ClassificationTask:
            task = config.tasks[self._task]
            assert isinstance(task, ClassificationTaskConfig)
            return ClassificationTask(
                self._task,
                task,
                _ARRAY,
                context_length=config.model.context_length,
                patch_length=config.model.patch_length,
                seed=config.seed,
                data=data,
            )

        self._fit(make_task)
        self.classes_ = classes
        return self

    def predict_proba(self, X: Any) -> Floats:
        """Return the probability of each class."""
        predictor = self._fitted()
        assert isinstance(self.task_, ClassificationTask)
        cases, _ = cases_from_arrays(X)
        expected = self.task_.data.train.num_variates
        if cases.num_variates != expected:
            raise DataError(f"X: cases have {cases.num_variates} variates, fitted were {expected}")
        logits_BY = predictor.predict(self.task_.windows(cases), self._task)
        return torch.from_numpy(logits_BY).softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each case."""
        probability_BY = self.predict_proba(X)
        return self.classes_[probability_BY.argmax(axis=1)]


def _table(X: Any) -> Table:
    """Take rows as a user has them."""
    values_LC = np.asarray(X, np.float32)
    if values_LC.ndim == 1:
        values_LC = values_LC[:, None]
    if values_LC.ndim != 2 or 0 in values_LC.shape:
        raise DataError(f"X has shape {np.shape(X)}; expected rows in the order of time x variates")
    if np.isinf(values_LC).any():
        raise DataError("X holds infinite values; mark what is missing as NaN")
    names = tuple(f"variate {place}" for place in range(values_LC.shape[1]))
    return Table(path=_ARRAY, timestamps=None, freq=None, variates=names, values_LC=values_LC)


def _with_all_rows(
    task: ForecastTaskConfig | ImputationTaskConfig, num_rows: int
) -> Any:  # of the type of the task
    """Let nearly all rows train and validate: what is judged is given to `score`."""
    from dataclasses import replace

    if task.split is not None:
        return task
    length = task.prediction_length if isinstance(task, ForecastTaskConfig) else 0
    # The protocol wants a test part; it is as short as it may be, and never looked at.
    test = max(length + 1, num_rows // 100) / num_rows
    if test >= 0.3:
        raise DataError(
            f"X has {num_rows} rows, too few for tasks.forecast.prediction_length={length}; give "
            f"{4 * length} or more, or forecast fewer steps"
        )
    return replace(task, split=(0.8 - test, 0.2, test))


def _scaler(task: Task) -> Scaler:
    assert isinstance(task, (TableForecastTask, ImputationTask))
    return task.scaler


def _check_variates(values_CL: Floats, expected: int) -> None:
    if len(values_CL) != expected:
        raise DataError(f"X has {len(values_CL)} variates, fitted were {expected}")


def _flags(y: Any, length: int) -> np.ndarray:
    flags = np.asarray(y)
    if flags.shape != (length,) or not np.isin(flags, (0, 1)).all():
        raise ConfigError(
            f"y must hold 0 or 1 for each of the {length} rows of X, got an array of shape "
            f"{flags.shape} with values such as {flags.ravel()[:3].tolist()}"
        )
    return flags.astype(bool)
