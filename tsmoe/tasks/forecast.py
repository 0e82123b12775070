"""Forecasting a table with all steps of the horizon at once.

Shapes: B windows, C variates, L context steps (or rows of a table), Q prediction steps,
W = L + Q steps of a window.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipeline.table import Table, read_table
from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.evaluate.baselines import season_length
from tsmoe.evaluate.forecast import evaluate_forecast
from tsmoe.evaluate.protocol import Borders, Scaler, check_rows, fit_scaler, ltsf_borders
from tsmoe.heads.task import ForecastHeadConfig
from tsmoe.tasks.config import ForecastTaskConfig, ImputationTaskConfig
from tsmoe.tasks.predictor import TaskForecaster, TaskPredictor
from tsmoe.tasks.task import TaskEvaluation
from tsmoe.tasks.windows import Floats, Integers, WindowStore, bounded, points_batch


class TableForecastTask:
    """A table of variates, forecast window by window (LTSF, and TFB: nothing is dropped)."""

    def __init__(
        self,
        name: str,
        config: ForecastTaskConfig,
        path: str,
        *,
        context_length: int,
        table: Table | None = None,
    ) -> None:
        """Open the table, unless it is given.

        Raises:
            ConfigError: if a column is named that is not there.
            DataError: if there are too few rows, or nothing is observed of a variate.
        """
        self.name, self.config, self.source = name, config, path
        self.context_length = context_length
        self.loss_of_points = config.loss
        self.table, self.borders, self.scaler, scaled_LC = open_scaled(
            config,
            path,
            context_length=context_length,
            prediction_length=config.prediction_length,
            table=table,
        )
        segments = [scaled_LC]
        if config.is_univariate:
            segments = [scaled_LC[:, place, None] for place in range(scaled_LC.shape[1])]
        self._store = WindowStore(segments, lead=0)
        self._length = context_length + config.prediction_length
        borders = self.borders
        self._train_M = self._starts(0, borders.train_end)
        self._validation_M = self._starts(
            borders.train_end - context_length, borders.validation_end
        )
        test_M = self._starts(borders.validation_end - context_length, borders.test_end)
        parts = {"train": self._train_M, "validation": self._validation_M, "test": test_M}
        for part, starts_M in parts.items():
            if not len(starts_M):
                raise DataError(
                    f"{path}: no window of the {part} part has an observed value to forecast; "
                    f"change tasks.{name}.split or leave out empty columns (tasks.{name}.columns)"
                )
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
        """Name the table, or of univariate windows the variate."""
        return self.table.variates[number] if self.config.is_univariate else self.source

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Say what is forecast."""
        return {
            "type": "forecast",
            "prediction_length": self.config.prediction_length,
            "variates": list(self.table.variates),
        }

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Forecast every window of the test part, beside the baselines."""
        return evaluate_table(
            predictor,
            self.name,
            self.table,
            prediction_length=self.config.prediction_length,
            split=self.config.split,
            season=self.config.season,
        )

    def _starts(self, first: int, end: int) -> Integers:
        """Return windows within some rows that have something to forecast."""
        last = end - self._length
        starts_M = np.concatenate(
            [self._store.starts(place, first, last) for place in range(len(self._store.offsets))]
        )
        recorded_M = self._store.count_recorded(starts_M, self.context_length, self._length)
        return starts_M[recorded_M > 0]

    def _batch(self, starts_B: Integers) -> WindowBatch:
        values_BCW = self._store.cut(starts_B, self._length)
        is_context_W = np.arange(self._length) < self.context_length
        return points_batch(
            values_BCW,
            shown_BCW=is_context_W,
            target_BCW=~is_context_W,
            ids_B=np.array([self._store.segment_of(int(start)) for start in starts_B]),
            task=self.name,
        )


def open_scaled(
    config: ForecastTaskConfig | ImputationTaskConfig,
    path: str,
    *,
    context_length: int,
    prediction_length: int,
    table: Table | None,
) -> tuple[Table, Borders, Scaler, Floats]:
    """Read a table, unless it is given, and scale it by its train part."""
    if table is None:
        table = read_table(
            path,
            time_column=config.time_column,
            columns=config.columns,
            ignores_time=config.ignores_time,
        )
    borders = ltsf_borders(path, len(table.values_LC), split=config.split)
    check_rows(
        borders,
        path=path,
        context_length=context_length,
        prediction_length=prediction_length,
        fits=True,
    )
    scaler = fit_scaler(table.values_LC[: borders.train_end], table.variates, path=path)
    scaled_LC = bounded((table.values_LC - scaler.mean_C) / scaler.std_C)
    return table, borders, scaler, scaled_LC


def evaluate_table(
    predictor: TaskPredictor,
    task: str,
    table: Table,
    *,
    prediction_length: int,
    split: tuple[float, float, float] | None,
    season: int | None,
) -> TaskEvaluation:
    """Forecast every window of a table's test part, beside the baselines."""
    forecaster: Any = TaskForecaster(predictor, task)  # what is asked of a Forecaster it can do
    season = season or season_length(table.freq)
    is_seasonal = season is not None and season <= predictor.context_length
    evaluation = evaluate_forecast(
        forecaster,
        table,
        context_length=predictor.context_length,
        prediction_length=prediction_length,
        split=split,
        season=season,
        baselines=("linear", *(("seasonal_naive",) if is_seasonal else ()), "naive"),
        must_fit=False,
    )
    found = evaluation.to_json_dict()
    results = found.pop("results")
    variates = found.pop("variates")
    for known in ("task", "data"):
        found.pop(known)
    assert isinstance(results, list)
    return TaskEvaluation(
        task="forecast",
        data=table.path,
        facts=found,
        results=results,
        tables={"variates": variates},
    )
