"""PatchMoE in the way of scikit-learn: `fit`, `predict`, `score` on arrays.

Shapes: B cases, C variates, L steps, Q prediction steps. Arrays of users have steps first: (L, C).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, OutlierMixin, TransformerMixin
from sklearn.exceptions import NotFittedError

from tsmoe.errors import ConfigError, DataError, TrainingError
from tsmoe.evaluate.anomaly_metrics import auc_roc
from tsmoe.evaluate.protocol import Scaler
from tsmoe.inference import choose_device
from tsmoe.tasks.anomaly import AnomalyTask
from tsmoe.tasks.anomaly_data import AnomalyData, Entity
from tsmoe.tasks.arrays import ARRAY, check_variates, flags_of, rows_of, split_all, table_of
from tsmoe.tasks.case_data import CaseData, cases_from_arrays
from tsmoe.tasks.classification import ClassificationTask
from tsmoe.tasks.config import (
    AnomalyTaskConfig,
    ClassificationTaskConfig,
    TaskRunConfig,
    resolve_tasks,
)
from tsmoe.tasks.forecast import TableForecastTask
from tsmoe.tasks.imputation import ImputationTask, draw_mask, fill_rows
from tsmoe.tasks.predictor import Floats, TaskForecaster, TaskPredictor
from tsmoe.tasks.run import train_tasks
from tsmoe.tasks.task import Task
from tsmoe.tasks.windows import bounded, generator_of
from tsmoe.train.loop import Outcome
from tsmoe.train.run_config import FINE_TUNING, read_preset

logger = logging.getLogger(__name__)

# Windows that pass the model together.
_BLOCK = 256
# Settings that say what is where in a file.
_OF_FILES = ("path", "columns", "time_column", "ignores_time", "entity_column", "label_column",
             "split_column", "train_share", "leaves_out_labelled")  # fmt: skip


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
            run: folder to keep the run in, for one fit; None: a temporary one, removed after it.
            seed: of weights and of the order of windows.
            device: `auto`, `cpu` or `cuda`.
        """
        self.settings = settings
        self.run = run
        self.seed = seed
        self.device = device

    def _config(self, folder: str) -> TaskRunConfig:
        preset = read_preset(self._preset, FINE_TUNING)
        given = [*self.settings, f"run={folder}", f"data={ARRAY}", f"seed={self.seed}",
                 f"training.device={self.device}"]  # fmt: skip
        return resolve_tasks(preset, self._preset, given)

    def _fit(self, make_task: Callable[[TaskRunConfig], Task]) -> Self:
        # Training draws from torch's own random numbers, which are those of the user.
        with (
            tempfile.TemporaryDirectory(prefix="tsmoe-") as temporary,
            torch.random.fork_rng(devices=[]),
        ):
            config = self._config(str(Path(temporary) / "run") if self.run is None else self.run)
            self._check(config)
            task = make_task(config)
            try:
                outcome, result = train_tasks(config, {self._task: task}, evaluates=False)
            except TrainingError as error:
                # A folder that is gone by then tells nobody anything.
                where = "" if self.run is None else f"{config.run}: "
                raise TrainingError(where + str(error).removeprefix(f"{config.run}: ")) from error
        if outcome is Outcome.STOPPED:
            raise KeyboardInterrupt("fit was interrupted")
        assert result is not None, "one process: it is the first"
        card = {"tasks": {self._task: task.card()}}
        self.task_ = task
        self.predictor_ = TaskPredictor(result.model, card, choose_device(self.device))
        self.best_step_ = result.best_step
        return self

    def _check(self, config: TaskRunConfig) -> None:
        """Refuse settings that arrays have no use for."""
        usual = read_preset(self._preset, FINE_TUNING)["tasks"][self._task]["type"]
        task = config.tasks.get(self._task)
        if len(config.tasks) != 1 or task is None or task.type != usual:
            raise ConfigError(
                f"settings: {type(self).__name__} has one task, {self._task} of the type {usual}"
            )
        for name in _OF_FILES:
            if getattr(task, name, None):
                raise ConfigError(
                    f"settings: tasks.{self._task}.{name} is for files; choose rows and columns of "
                    "the array instead"
                )

    def _fitted(self) -> TaskPredictor:
        if not hasattr(self, "predictor_"):
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet; call fit before asking it anything"
            )
        return self.predictor_


class _TableEstimator(_TaskEstimator):
    """What estimators of tables share: rows in the order of time, scaled as in fitting."""

    def _fit_table(self, X: Any, task_class: Any, **more: str) -> Self:  # a class of tasks
        rows_LC = rows_of(X)
        table = table_of(rows_LC)

        def make_task(config: TaskRunConfig) -> Task:
            task: Any = config.tasks[self._task]  # of the type that _check has seen
            length = config.model.context_length
            split = split_all(task, len(rows_LC), context_length=length)
            extra = {argument: getattr(config, field) for argument, field in more.items()}
            return task_class(
                self._task,
                replace(task, split=split),
                ARRAY,
                context_length=length,
                table=table,
                **extra,
            )

        self._fit(make_task)
        self._last_LC = rows_LC[-self.predictor_.context_length :]
        return self

    def _scaler(self) -> Scaler:
        self._fitted()
        assert isinstance(self.task_, (TableForecastTask, ImputationTask))
        return self.task_.scaler

    def _scaled(self, X: Any) -> Floats:
        """Return scaled rows, of as many variates as were learned from."""
        scaler, rows_LC = self._scaler(), rows_of(X)
        check_variates(rows_LC, len(scaler.mean_C))
        return bounded((rows_LC - scaler.mean_C) / scaler.std_C)


class PatchMoEForecaster(_TableEstimator):
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
        return self._fit_table(X, TableForecastTask)

    def predict(self, X: Any = None) -> Floats:
        """Return forecast (Q, C) of what follows the rows of X, or those that were learned from."""
        predictor = self._fitted()
        scaled_LC = self._scaled(self._last_LC if X is None else X)
        forecaster = TaskForecaster(predictor, self._task)
        mean_CQ = forecaster.forecast(scaled_LC.T, forecaster.prediction_length).mean_BCQ[0]
        return self._scaler().unscale(mean_CQ).T

    def score(self, X: Any, y: None = None) -> float:  # noqa: ARG002
        """Return the negative mean squared error over all windows of X, scaled as in fitting."""
        predictor = self._fitted()
        scaled_LC = self._scaled(X)
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


class PatchMoEImputer(TransformerMixin, _TableEstimator):
    """Fills what is missing of a table; `fit` takes it in the order of time, with its gaps."""

    _preset, _task = "patch_moe_imputation", "imputation"

    def fit(self, X: Any, y: None = None) -> Self:  # noqa: ARG002
        """Learn from an array (L, C) or (L,); NaN where not observed.

        Raises:
            DataError: if it is too short, or nothing is observed of a variate.
        """
        return self._fit_table(X, ImputationTask, seed="seed")

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return the table with every NaN filled; what is observed stays as it is.

        Raises:
            DataError: if nothing of a variate is observed.
        """
        predictor = self._fitted()
        scaled_LC, rows_LC = self._scaled(X), rows_of(X)
        is_empty_C = ~np.isfinite(rows_LC).any(axis=0)
        if is_empty_C.any():
            raise DataError(
                f"X: all points of variate {int(is_empty_C.argmax())} are missing, so there is "
                "nothing to fill them from; leave it out or give rows with values"
            )
        scaler = self._scaler()
        filled_LC = fill_rows(predictor, self._task, scaled_LC) * scaler.std_C + scaler.mean_C
        return np.where(np.isfinite(rows_LC), rows_LC, filled_LC)

    def predict(self, X: Any) -> NDArray[np.float64]:
        """Return what `transform` does."""
        return self.transform(X)

    def score(self, X: Any, y: None = None, *, share: float = 0.25) -> float:  # noqa: ARG002
        """Hide a share of the points; return the negative mean squared error on them, scaled."""
        predictor = self._fitted()
        if not 0 < share < 1:
            raise ConfigError(f"share ({share}) must lie between 0 and 1: some points stay to see")
        scaled_LC = self._scaled(X)
        hidden_LC = draw_mask(scaled_LC.shape, "points", share, 1, generator_of(self.seed, 4))
        filled_LC = fill_rows(predictor, self._task, np.where(hidden_LC, np.nan, scaled_LC))
        error = (filled_LC - scaled_LC)[hidden_LC & np.isfinite(scaled_LC)].astype(np.float64)
        if not len(error):
            raise DataError(f"X: share={share} hides no observed value; give more rows")
        return -float(np.square(error).mean())


class PatchMoEAnomalyDetector(OutlierMixin, _TaskEstimator):
    """Learns what is usual, and says how unusual each row is.

    As scikit-learn's outlier detectors: `predict` gives -1 for anomalies and 1 for others, the
    higher `decision_function` and `score_samples`, the more usual a row.
    """

    _preset, _task = "patch_moe_anomaly", "anomaly"

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from rows (L, C) or (L,); those that `y` marks with 1 or True are left out."""
        rows_LC = rows_of(X)
        is_anomaly_L = np.zeros(len(rows_LC), bool) if y is None else flags_of(y, len(rows_LC))
        values_LC = np.where(is_anomaly_L[:, None], np.nan, rows_LC)
        entity = Entity(
            name=ARRAY,
            train_LC=values_LC,
            train_is_anomaly_L=None,
            test_LC=values_LC[:1],
            test_is_anomaly_L=np.zeros(1, bool),
        )
        names = tuple(f"variate {place}" for place in range(values_LC.shape[1]))
        data = AnomalyData(path=ARRAY, variates=names, entities=(entity,))

        def make_task(config: TaskRunConfig) -> AnomalyTask:
            task = config.tasks[self._task]
            assert isinstance(task, AnomalyTaskConfig)
            return AnomalyTask(
                self._task,
                task,
                ARRAY,
                context_length=config.model.context_length,
                patch_length=config.model.patch_length,
                seed=config.seed,
                data=data,
            )

        self._fit(make_task)
        self.threshold_ = self._anomaly_task().threshold(self.predictor_)
        return self

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Return the negative reconstruction error of each row; 0 where nothing is observed."""
        predictor, task = self._fitted(), self._anomaly_task()
        rows_LC, scaler = rows_of(X), task.scalers[0]
        check_variates(rows_LC, len(scaler.mean_C))
        scaled_LC = bounded((rows_LC - scaler.mean_C) / scaler.std_C)
        return -np.nan_to_num(task.scores(predictor, scaled_LC), nan=0.0)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Return `score_samples` above the threshold; negative for anomalies."""
        return self.score_samples(X) + self.threshold_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """Return -1 for anomalies and 1 for other rows."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def score(self, X: Any, y: Any) -> float:
        """Return the AUC-ROC of the scores; `y` has 1 or True for anomalies."""
        self._fitted()
        scores_L = -self.score_samples(X)
        is_anomaly_L = flags_of(y, len(scores_L))
        try:
            return auc_roc(scores_L, is_anomaly_L)
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
        data = CaseData(path=ARRAY, classes=names, train=cases, test=cases)

        def make_task(config: TaskRunConfig) -> ClassificationTask:
            task = config.tasks[self._task]
            assert isinstance(task, ClassificationTaskConfig)
            return ClassificationTask(
                self._task,
                task,
                ARRAY,
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
