"""Forecasting many univariate series, each of which is followed by a test part of its own (M4).

Shapes: B windows, S series, L points of a series, Q prediction steps, W steps of a window.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.evaluate.baselines import season_length
from tsmoe.evaluate.m4 import m4_scores, naive2
from tsmoe.heads.task import ForecastHeadConfig
from tsmoe.tasks.config import ForecastTaskConfig
from tsmoe.tasks.predictor import TaskForecaster, TaskPredictor, fit_length
from tsmoe.tasks.series_data import read_series
from tsmoe.tasks.task import MODEL, TaskEvaluation
from tsmoe.tasks.windows import Floats, Integers, WindowStore, points_batch


class SeriesForecastTask:
    """Windows of all series, each scaled by its own train part; the last of each is for validation.

    Windows may begin before their series do, so that short series are learned from too.
    """

    def __init__(
        self, name: str, config: ForecastTaskConfig, path: str, *, context_length: int
    ) -> None:
        """Read the series.

        Raises:
            DataError: if no series is long enough to learn from.
        """
        self.name, self.config, self.source = name, config, path
        self.context_length = context_length
        self.loss_of_points = config.loss
        self.data = data = read_series(path, config.test_path, config.prediction_length)
        self._loc_S = np.array([np.nanmean(train_L) for train_L in data.train])
        std_S = np.array([np.nanstd(train_L) for train_L in data.train])
        self._scale_S = np.where(std_S > 0, std_S, 1.0)
        segments = [self._scaled(number)[:, None] for number in range(len(data.train))]
        self._store = WindowStore(segments, lead=context_length)
        horizon = config.prediction_length
        self._length = context_length + horizon
        train, validation = [], []
        for number, segment_LC in enumerate(segments):
            rows = len(segment_LC)
            if rows < horizon + 2:
                continue
            # Starts count from the first point of the series, before which there is a frame.
            last = rows - self._length
            validation.append(self._store.starts(number, last, last))
            train.append(self._store.starts(number, 2 - context_length, last - horizon))
        if not sum(map(len, train)):
            longest = max(len(train_L) for train_L in data.train)
            raise DataError(
                f"{path}: the longest series has {longest} points; {2 * horizon + 2} are needed to "
                f"learn from it and to validate at tasks.{name}.prediction_length={horizon}"
            )
        self._train_M = self._with_targets(np.concatenate(train))
        self._validation_M = self._with_targets(np.concatenate(validation))
        self.num_train, self.num_validation = len(self._train_M), len(self._validation_M)
        self.fingerprint = self._store.fingerprint

    def head(self) -> ForecastHeadConfig:
        """Return the head that forecasts all steps."""
        return ForecastHeadConfig(
            prediction_length=self.config.prediction_length, dropout=self.config.head_dropout
        )

    def training_batch(self, items: Integers, positions: Integers) -> WindowBatch:  # noqa: ARG002
        """Cut training windows."""
        return self._batch(self._train_M[items])

    def validation_batch(self, places: Integers) -> WindowBatch:
        """Cut validation windows."""
        return self._batch(self._validation_M[places])

    def series_name(self, number: int) -> str:
        """Name a series."""
        return self.data.names[number]

    def card(self) -> dict[str, Any]:
        """Say what is forecast."""
        return {"type": "forecast", "prediction_length": self.config.prediction_length}

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Forecast what follows each series, by the measures of the M4 competition."""
        forecaster = TaskForecaster(predictor, self.name)
        data, horizon = self.data, self.config.prediction_length
        season = self.config.season or season_length(data.freq) or 1
        # M4 counts weeks as without a season.
        season = 1 if data.freq is not None and data.freq.startswith("W") else season
        context_SCL = np.concatenate(
            [
                fit_length(self._scaled(number)[None, None], self.context_length)
                for number in range(len(data.train))
            ]
        )
        scaled_SQ = forecaster.forecast_batch(context_SCL, horizon).mean_BCQ[:, 0]
        forecasts = scaled_SQ * self._scale_S[:, None] + self._loc_S[:, None]
        methods = {
            MODEL: forecasts,
            "naive2": [naive2(train_L, horizon, season) for train_L in data.train],
            "naive": [np.repeat(train_L[-1], horizon) for train_L in data.train],
        }
        results: list[dict[str, Any]] = []
        for model, predicted in methods.items():
            scores = m4_scores(data.train, list(data.test_SQ), list(predicted), season=season)
            results.append({"model": model, "smape": scores.smape, "mase": scores.mase,
                            "owa": scores.owa})  # fmt: skip
        return TaskEvaluation(
            task="forecast",
            data=self.source,
            facts={
                "context": self.context_length,
                "horizon": horizon,
                "series": len(data.train),
                "season": season,
                "protocol": "m4",
            },
            results=results,
        )

    def _scaled(self, number: int) -> Floats:
        values_L = self.data.train[number]
        return ((values_L - self._loc_S[number]) / self._scale_S[number]).astype(np.float32)

    def _with_targets(self, starts_M: Integers) -> Integers:
        recorded_M = self._store.count_recorded(starts_M, self.context_length, self._length)
        return starts_M[recorded_M > 0]

    def _batch(self, starts_B: Integers) -> WindowBatch:
        is_context_W = np.arange(self._length) < self.context_length
        # A window ends in the series that it is of, but may begin in the frame before it.
        ends_B = starts_B + self._length - 1
        return points_batch(
            self._store.cut(starts_B, self._length),
            shown_BCW=is_context_W,
            target_BCW=~is_context_W,
            ids_B=np.array([self._store.segment_of(int(end)) for end in ends_B]),
            task=self.name,
        )
