"""Forecasting many univariate series, each of which is followed by a test part of its own (M4).

Shapes: B windows, S series, L points of a series, Q prediction steps, W steps of a window.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.evaluate.baselines import season_length
from tsmoe.evaluate.m4 import m4_scores, naive2
from tsmoe.heads.task import ForecastHeadConfig
from tsmoe.tasks.config import SeriesTaskConfig
from tsmoe.tasks.predictor import TaskForecaster, TaskPredictor, fit_length
from tsmoe.tasks.series_data import read_series
from tsmoe.tasks.task import MODEL, TaskEvaluation
from tsmoe.tasks.windows import Floats, Integers, WindowStore, bounded, points_batch

logger = logging.getLogger(__name__)


class SeriesForecastTask:
    """Windows of all series, each scaled by its own train part; the last of each is for validation.

    Windows may begin before their series do, so that short series are learned from too.
    """

    def __init__(
        self, name: str, config: SeriesTaskConfig, path: str, *, context_length: int
    ) -> None:
        """Read the series.

        Raises:
            DataError: if no series is long enough to learn from.
        """
        self.name, self.config, self.source = name, config, path
        self.context_length = context_length
        self.loss_of_points = config.loss
        self.data = data = read_series(path, config.test_path, config.prediction_length)
        # Of what is learned from, without the last part, which validates.
        self._loc_S, self._scale_S = scales_of_series(data.train, config.prediction_length)
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
            prediction_length=self.config.prediction_length,
            dropout=self.config.head_dropout,
            shortcut=self.config.shortcut,
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

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Say what is forecast."""
        return {"type": "series", "prediction_length": self.config.prediction_length}

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Forecast what follows each series, by the measures of the M4 competition."""
        data, horizon = self.data, self.config.prediction_length
        season = self._season()
        forecasts = self._forecasts(TaskForecaster(predictor, self.name))
        reasons = [self._why_not(number, season) for number in range(len(data.train))]
        kept = [number for number, reason in enumerate(reasons) if reason is None]
        left_out = len(reasons) - len(kept)
        if left_out:
            why = ", ".join(dict.fromkeys(reason for reason in reasons if reason is not None))
            logger.warning("%s: %d series are not judged: %s", self.source, left_out, why)
        trains, targets = [data.train[n] for n in kept], [data.test_SQ[n] for n in kept]
        methods = {
            MODEL: [forecasts[n] for n in kept],
            "naive2": [naive2(train_L, horizon, season) for train_L in trains],
            "naive": [np.repeat(train_L[-1], horizon) for train_L in trains],
        }
        results: list[dict[str, Any]] = []
        for model, predicted in methods.items() if kept else ():
            scores = m4_scores(trains, targets, predicted, season=season)
            results.append({"model": model, "smape": scores.smape, "mase": scores.mase,
                            "owa": scores.owa})  # fmt: skip
        return TaskEvaluation(
            task="series",
            data=self.source,
            facts={
                "context": self.context_length,
                "horizon": horizon,
                "series": len(kept),
                "series_left_out": left_out,
                "season": season,
                "protocol": "m4",
            },
            results=results,
        )

    def _season(self) -> int:
        """Return what is set, or that of the interval; in the M4 competition weeks have none."""
        if self.config.season is not None:
            return self.config.season
        freq = self.data.freq
        if freq is None or freq.startswith("W"):
            return 1
        return season_length(freq) or 1

    def _why_not(self, number: int, season: int) -> str | None:
        """Say why a series cannot be judged by the measures of M4; None if it can."""
        train_L, test_Q = self.data.train[number], self.data.test_SQ[number]
        if not (np.isfinite(train_L).all() and np.isfinite(test_Q).all()):
            return "values are missing"
        if len(train_L) <= season:
            return "no longer than a season"
        if not np.abs(train_L[season:] - train_L[:-season]).any():
            return "it repeats its season exactly"
        try:
            naive2(train_L, 1, season)
        except ValueError:
            return "seasonal with values that are not positive"
        return None

    def _forecasts(self, forecaster: TaskForecaster) -> NDArray[np.float64]:
        """Return forecast_SQ of what follows each series, in its own unit."""
        context_SCL = np.concatenate(
            [
                fit_length(self._scaled(number)[None, None], self.context_length)
                for number in range(len(self.data.train))
            ]
        )
        horizon = self.config.prediction_length
        scaled_SQ = forecaster.forecast_batch(context_SCL, horizon).mean_BCQ[:, 0]
        return scaled_SQ * self._scale_S[:, None] + self._loc_S[:, None]

    def _scaled(self, number: int) -> Floats:
        values_L = self.data.train[number]
        return bounded((values_L - self._loc_S[number]) / self._scale_S[number])

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


def scales_of_series(
    values: Sequence[Floats], prediction_length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and deviation of each series without its last steps, or of the whole if short."""
    parts = []
    for values_L in values:
        part_L = values_L[:-prediction_length]
        parts.append(part_L if np.isfinite(part_L).any() else values_L)
    loc_S = np.array([np.nanmean(part_L.astype(np.float64)) for part_L in parts])
    std_S = np.array([np.nanstd(part_L.astype(np.float64)) for part_L in parts])
    return loc_S, np.where(std_S > 0, std_S, 1.0)
