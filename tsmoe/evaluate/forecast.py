"""Evaluation of a forecaster on one table, side by side with the baselines.

Every model sees the same scaled windows, one block of them at a time.

Shapes: B windows, C variates, L context steps (or rows of a table), Q prediction steps, K quantile
levels.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.baselines import Baseline, Naive, SeasonalNaive, check_season, season_length
from tsmoe.evaluate.linear import fit_linear
from tsmoe.evaluate.metrics import ForecastMetrics, ForecastScores, seasonal_differences
from tsmoe.evaluate.protocol import (
    Borders,
    Scaler,
    WindowBlock,
    check_rows,
    fit_scaler,
    iterate_windows,
    ltsf_borders,
)
from tsmoe.evaluate.report import ForecastPicture

if TYPE_CHECKING:
    from data_pipeline.table import Table
    from tsmoe.inference import Forecast, Forecaster

logger = logging.getLogger(__name__)

BASELINES = ("naive", "seasonal_naive", "linear")
MODEL = "tsmoe"
"""Name of the package's own row among the results."""

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows in all."""


@dataclass(frozen=True, kw_only=True)
class ForecastEvaluation:
    """Errors of all models on the same windows."""

    data: str
    context_length: int
    prediction_length: int
    windows: int
    variates: tuple[str, ...]
    scores: dict[str, ForecastScores]
    """By model; the package first, then the baselines."""
    example: ForecastPicture
    """The window in the middle of the test part, in the unit of the table."""

    def to_json_dict(self) -> dict[str, object]:
        """Give the result file of `tsmoe evaluate --json`.

        `variates` holds the package's mse by variate, null where no target is observed, and
        `observed_fraction` the share of the targets that count.
        """
        own = self.scores[MODEL]
        return {
            "task": "forecast",
            "data": self.data,
            "context": self.context_length,
            "horizon": self.prediction_length,
            "windows": self.windows,
            "protocol": "ltsf",
            "observed_fraction": own.observed_fraction,
            "results": [
                {"model": model, **scores.to_json_dict()} for model, scores in self.scores.items()
            ],
            "variates": dict(zip(self.variates, own.variate_mse, strict=True)),
        }


def evaluate_forecast(
    forecaster: "Forecaster",
    table: "Table",
    *,
    context_length: int = 672,
    prediction_length: int = 96,
    split: tuple[float, float, float] | None = None,
    season: int | None = None,
    baselines: Iterable[str] = BASELINES,
    must_fit: bool = True,
    batch_size: int = 256,
    num_covariates: int = 0,
    num_known_future: int = 0,
    progress: Progress | None = None,
) -> ForecastEvaluation:
    """Forecast every test window of a table and compare with the baselines.

    Inputs and errors are on the scale of the train part. Contexts keep their gaps: a baseline
    treats them as its class says, the forecaster gets them as NaN.

    Args:
        split: shares of train, validation and test; None takes the usual borders of the set.
        season: steps in one season; None takes the usual one of the sampling interval.
        baselines: any of `BASELINES`; `linear` is the only one that is fitted.
        must_fit: whether `linear` must be there; else it is left out, with a warning, where gaps
            leave nothing to fit it on.
        batch_size: windows that are forecast together.
        num_covariates: last variates of the table, that the forecaster sees and does not forecast;
            baselines do not see them.
        num_known_future: last covariates, whose values in the steps to forecast it sees too.

    Raises:
        ConfigError: for an unknown baseline, an unknown season, or one longer than
            the context.
        DataError: if the table is too short, a variate has no observed value to scale by, or
            the forecaster returns a value that is not finite.
    """
    baselines = tuple(baselines)
    _check_settings(baselines, context_length, prediction_length, batch_size)
    borders = ltsf_borders(table.path, len(table.values_LC), split=split)
    check_rows(
        borders,
        path=table.path,
        context_length=context_length,
        prediction_length=prediction_length,
        fits="linear" in baselines,
    )
    season = _find_season(table, season, is_required="seasonal_naive" in baselines)
    if "seasonal_naive" in baselines:
        check_season(season, context_length)
    num_targets = len(table.variates) - num_covariates
    _check_targets(table, borders, num_targets=num_targets)
    scaler = fit_scaler(table.values_LC[: borders.train_end], table.variates, path=table.path)
    scaled_LC = scaler.scale(table.values_LC)
    references = _fit_baselines(
        baselines,
        scaled_LC[:, :num_targets],
        borders,
        season=season,
        context_length=context_length,
        prediction_length=prediction_length,
        path=table.path,
        must_fit=must_fit,
    )
    seasonal_error_C = seasonal_differences(scaled_LC[: borders.train_end, :num_targets], season)
    levels = tuple(forecaster.quantile_levels)
    own = ForecastMetrics(seasonal_error_C, quantile_levels=levels)
    others = {name: ForecastMetrics(seasonal_error_C) for name in references}
    windows = borders.window_count(prediction_length)
    example: ForecastPicture | None = None
    for block in iterate_windows(
        scaled_LC,
        first_target=borders.validation_end,
        end=borders.test_end,
        context_length=context_length,
        prediction_length=prediction_length,
        block_size=batch_size,
    ):
        forecast = forecaster.forecast_batch(
            block.context_BCL,
            prediction_length,
            batch_size=batch_size,
            num_covariates=num_covariates,
            future_BFQ=block.target_BCQ[:, len(table.variates) - num_known_future :],
        )
        block = block.of_first(num_targets)
        _check_finite(forecast, block, table=table, borders=borders)
        own.update(forecast.mean_BCQ, block.target_BCQ, quantiles_BCQK=forecast.quantiles_BCQK)
        for name, baseline in references.items():
            others[name].update(
                baseline.forecast(block.context_BCL, prediction_length), block.target_BCQ
            )
        done = block.first + len(block.context_BCL)
        if block.first <= windows // 2 < done:
            example = _picture(
                forecast,
                block,
                place=windows // 2 - block.first,
                table=table,
                scaler=scaler.of_first(num_targets),
                first_row=borders.validation_end + windows // 2 - context_length,
                levels=levels,
            )
        if progress is not None:
            progress(done, windows)
    assert example is not None, "check_rows leaves at least one window"
    return ForecastEvaluation(
        data=table.path,
        context_length=context_length,
        prediction_length=prediction_length,
        windows=windows,
        variates=table.variates[:num_targets],
        scores={MODEL: own.scores(), **{name: sums.scores() for name, sums in others.items()}},
        example=example,
    )


def _check_settings(
    baselines: tuple[str, ...],
    context_length: int,
    prediction_length: int,
    batch_size: int,
) -> None:
    unknown = [name for name in baselines if name not in BASELINES]
    if unknown:
        raise ConfigError(f"unknown baseline {unknown[0]!r}; there are: {', '.join(BASELINES)}")
    lengths = {
        "context_length": context_length,
        "prediction_length": prediction_length,
        "batch_size": batch_size,
    }
    for name, value in lengths.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


def _fit_baselines(
    names: tuple[str, ...],
    scaled_LC: np.ndarray,
    borders: Borders,
    *,
    season: int,
    context_length: int,
    prediction_length: int,
    path: str,
    must_fit: bool,
) -> dict[str, Baseline]:
    baselines: dict[str, Baseline] = {}
    for name in names:
        match name:
            case "naive":
                baselines[name] = Naive()
            case "seasonal_naive":
                baselines[name] = SeasonalNaive(season)
            case "linear":
                try:
                    baselines[name] = fit_linear(
                        scaled_LC,
                        borders,
                        context_length=context_length,
                        prediction_length=prediction_length,
                        path=path,
                    )
                except DataError as error:
                    if must_fit:
                        raise
                    logger.warning("left out: %s", error)
    return baselines


def _find_season(table: "Table", season: int | None, *, is_required: bool) -> int:
    if season is not None:
        if season < 1:
            raise ConfigError(f"season must be at least 1, got {season}")
        return season
    season = season_length(table.freq)
    if season is None and is_required:
        raise ConfigError(
            f"{table.path}: the sampling interval ({table.freq or 'unknown'}) has no usual season; "
            "give its length in rows with --season (1 for none)"
        )
    return season or 1  # mase alone can do without a season


def _check_targets(table: "Table", borders: Borders, *, num_targets: int) -> None:
    test_LC = table.values_LC[borders.validation_end : borders.test_end, :num_targets]
    if not np.isfinite(test_LC).any():
        raise DataError(
            f"{table.path}: no observed value in the test part (rows {borders.validation_end} to "
            f"{borders.test_end}), so nothing can be compared; change the split"
        )


def _check_finite(
    forecast: "Forecast", block: WindowBlock, *, table: "Table", borders: Borders
) -> None:
    expected = block.target_BCQ.shape
    if forecast.mean_BCQ.shape != expected:
        raise ValueError(f"the forecast has shape {forecast.mean_BCQ.shape}, expected {expected}")
    is_finite_BC = np.isfinite(forecast.mean_BCQ).all(axis=-1)
    if forecast.quantiles_BCQK is not None:
        is_finite_BC &= np.isfinite(forecast.quantiles_BCQK).all(axis=(-2, -1))
    if not is_finite_BC.all():
        window, variate = (int(place) for place in np.argwhere(~is_finite_BC)[0])
        row = borders.validation_end + block.first + window
        raise DataError(
            f"{table.path}: the forecast of test window {block.first + window} (from row {row}), "
            f"variate {table.variates[variate]}, is not finite; look for extreme values in the "
            "context, or leave the variate out with --columns"
        )


def _picture(
    forecast: "Forecast",
    block: WindowBlock,
    *,
    place: int,
    table: "Table",
    scaler: Scaler,
    first_row: int,
    levels: tuple[float, ...],
) -> ForecastPicture:
    quantiles_BCQK = forecast.quantiles_BCQK
    rows = block.context_BCL.shape[-1] + block.target_BCQ.shape[-1]
    return ForecastPicture(
        variates=table.variates[: block.context_BCL.shape[1]],
        context_CL=scaler.unscale(block.context_BCL[place]),
        truth_CQ=scaler.unscale(block.target_BCQ[place]),
        mean_CQ=scaler.unscale(forecast.mean_BCQ[place]),
        quantiles_CQK=None
        if quantiles_BCQK is None
        else np.stack(
            [scaler.unscale(quantiles_BCQK[place, ..., k]) for k in range(len(levels))], axis=-1
        ),
        quantile_levels=levels,
        times=None if table.timestamps is None else table.timestamps[first_row : first_row + rows],
    )
