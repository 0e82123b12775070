"""Evaluation in the way of GIFT-Eval: few windows, nothing scaled, MASE and CRPS.

The last tenth of a table is forecast in windows that do not overlap, 20 at most, each from all that
came before it (as far back as the model looks). Errors are put in relation to those of the seasonal
naive forecast on the same windows.

Source: GIFT-Eval (arXiv 2410.10393): windows, MASE scaled by the history of each window, CRPS as
the mean weighted sum quantile loss, both by GluonTS (arXiv 1906.05264). Departure: a table is one
entry with all its variates, as in its multivariate sets.

Shapes: B windows, C variates, L rows or context steps, Q prediction steps, K quantile levels.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.baselines import Naive, SeasonalNaive, season_length
from tsmoe.evaluate.metrics import (
    ForecastScores,
    interpolate_levels,
    seasonal_differences,
)

if TYPE_CHECKING:
    from data_pipeline.table import Table
    from tsmoe.inference import Forecaster

TEST_SHARE, MAX_WINDOWS = 0.1, 20
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Quantile levels of the CRPS; a point forecast counts as all of them."""
MODEL, SEASONAL = "tsmoe", "seasonal_naive"


@dataclass(frozen=True, kw_only=True)
class GiftEvaluation:
    """Errors of all models on the same windows."""

    data: str
    context_length: int
    prediction_length: int
    windows: int
    season: int
    variates: tuple[str, ...]
    scores: dict[str, ForecastScores]

    def to_json_dict(self) -> dict[str, object]:
        """Give the result file of `tsmoe evaluate --protocol gift --json`."""
        return {
            "task": "forecast",
            "data": self.data,
            "context": self.context_length,
            "horizon": self.prediction_length,
            "windows": self.windows,
            "season": self.season,
            "protocol": "gift",
            "results": [
                {"model": model, **scores.to_json_dict()} for model, scores in self.scores.items()
            ],
        }


def evaluate_gift(
    forecaster: "Forecaster",
    table: "Table",
    *,
    prediction_length: int = 96,
    context_length: int | None = None,
    season: int | None = None,
    batch_size: int = 256,
    num_covariates: int = 0,
    num_known_future: int = 0,
) -> GiftEvaluation:
    """Forecast the last windows of a table and compare with the naive forecasts.

    Args:
        context_length: rows seen at most; None for as many as the model looks back.
        season: rows in one season, for MASE and the seasonal naive forecast; None takes the usual
            one of the sampling interval, as GluonTS has it.
        num_covariates: as `evaluate_forecast`, like `num_known_future`.

    Raises:
        ConfigError: if a length is below 1, or the season is not known.
        DataError: if the table is too short for one window and a season before it, or nothing is
            observed where it would count.
    """
    lengths = (prediction_length, batch_size, 1 if context_length is None else context_length)
    if min(lengths) < 1:
        raise ConfigError(
            f"prediction_length ({prediction_length}), context_length ({context_length}) and "
            f"batch_size ({batch_size}) must be at least 1"
        )
    season = _season_of(table, season)
    first_row = _first_row(table, prediction_length, season)
    num_targets = len(table.variates) - num_covariates
    starts_B = np.arange(first_row, len(table.values_LC), prediction_length)
    reach = min(context_length or max(forecaster.context_length, season), first_row)
    context_BCL, target_BCQ = _windows(table, starts_B, reach, prediction_length)
    forecast = forecaster.forecast_batch(
        context_BCL,
        prediction_length,
        batch_size=batch_size,
        num_covariates=num_covariates,
        future_BFQ=target_BCQ[:, len(table.variates) - num_known_future :],
    )
    context_BCL, target_BCQ = context_BCL[:, :num_targets], target_BCQ[:, :num_targets]
    if not np.isfinite(forecast.mean_BCQ).all():
        raise DataError(
            f"{table.path}: a forecast is not finite; look for extreme values, or leave the "
            "variate out with --columns"
        )
    # Each window is measured by the seasonal differences of what came before it.
    scale_BC = np.stack([
        seasonal_differences(table.values_LC[:start, :num_targets], season) for start in starts_B
    ])  # fmt: skip
    quantiles_BCQK = None
    if forecast.quantiles_BCQK is not None:
        quantiles_BCQK = interpolate_levels(
            forecast.quantiles_BCQK, forecaster.quantile_levels, LEVELS
        )
    points = {
        SEASONAL: SeasonalNaive(season).forecast(context_BCL, prediction_length),
        "naive": Naive().forecast(context_BCL, prediction_length),
    }
    scores = {MODEL: gift_scores(forecast.mean_BCQ, quantiles_BCQK, target_BCQ, scale_BC)}
    for name, mean_BCQ in points.items():
        scores[name] = gift_scores(mean_BCQ, None, target_BCQ, scale_BC)
    base = scores[SEASONAL]
    return GiftEvaluation(
        data=table.path,
        context_length=reach,
        prediction_length=prediction_length,
        windows=len(starts_B),
        season=season,
        variates=table.variates[:num_targets],
        scores={name: _relative(found, base) for name, found in scores.items()},
    )


def gift_scores(
    mean_BCQ: np.ndarray,
    quantiles_BCQK: np.ndarray | None,
    target_BCQ: np.ndarray,
    scale_BC: np.ndarray,
) -> ForecastScores:
    """Measure forecasts; targets that are not observed do not count.

    Args:
        quantiles_BCQK: at `LEVELS`; None takes the point forecast for all of them.
        scale_BC: seasonal differences; windows and variates where it is 0 or NaN have no MASE.

    Raises:
        DataError: if no target is observed.
    """
    is_observed_BCQ = np.isfinite(target_BCQ)
    if not is_observed_BCQ.any():
        raise DataError("no observed target in the windows to forecast; nothing can be compared")
    error_BCQ = np.where(is_observed_BCQ, mean_BCQ - target_BCQ, np.nan).astype(np.float64)
    is_scaled_BC = np.isfinite(scale_BC) & (scale_BC > 0)
    scaled_BCQ = np.abs(error_BCQ) / np.where(is_scaled_BC, scale_BC, np.nan)[..., None]
    magnitude = float(np.nansum(np.abs(target_BCQ.astype(np.float64))))
    losses = []
    for k, level in enumerate(LEVELS):
        at_level_BCQ = mean_BCQ if quantiles_BCQK is None else quantiles_BCQK[..., k]
        short_BCQ = (target_BCQ - at_level_BCQ).astype(np.float64)
        losses.append(np.nansum(np.maximum(level * short_BCQ, (level - 1) * short_BCQ)))
    return ForecastScores(
        mse=float(np.nanmean(np.square(error_BCQ))),
        mae=float(np.nanmean(np.abs(error_BCQ))),
        mase=float(np.nanmean(scaled_BCQ)) if np.isfinite(scaled_BCQ).any() else None,
        crps=2 * float(np.mean(losses)) / magnitude if magnitude else None,
        variate_mse=tuple(
            float(np.nanmean(np.square(error_BCQ[:, c]))) if is_observed_BCQ[:, c].any() else None
            for c in range(target_BCQ.shape[1])
        ),
        observed_fraction=float(is_observed_BCQ.mean()),
    )


def _relative(found: ForecastScores, base: ForecastScores) -> ForecastScores:
    return replace(
        found,
        relative_mase=found.mase / base.mase if found.mase is not None and base.mase else None,
        relative_crps=found.crps / base.crps if found.crps is not None and base.crps else None,
    )


def _season_of(table: "Table", season: int | None) -> int:
    if season is None:
        # GluonTS takes days and weeks, unlike the usual baselines, one by one.
        unit = (table.freq or "").split("-")[0]
        season = 1 if unit in ("D", "W") else season_length(table.freq)
    if season is None:
        raise ConfigError(
            f"{table.path}: the sampling interval ({table.freq or 'unknown'}) has no usual season; "
            "give its length in rows with --season (1 for none)"
        )
    if season < 1:
        raise ConfigError(f"season must be at least 1, got {season}")
    return season


def _first_row(table: "Table", prediction_length: int, season: int) -> int:
    """Return the row of the first target."""
    num_rows = len(table.values_LC)
    wanted = int(np.ceil(TEST_SHARE * num_rows / prediction_length))
    windows = min(max(1, wanted), MAX_WINDOWS)
    first_row = num_rows - windows * prediction_length
    if first_row < season + 1:
        raise DataError(
            f"{table.path}: too few rows ({num_rows}) for {windows} windows of {prediction_length} "
            f"rows and a season of {season} before them; shorten --horizon or --season"
        )
    return first_row


def _windows(
    table: "Table", starts_B: np.ndarray, reach: int, prediction_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut context_BCL and target_BCQ in the unit of the table."""
    context = [table.values_LC[start - reach : start].T for start in starts_B]
    target = [table.values_LC[start : start + prediction_length].T for start in starts_B]
    return np.stack(context), np.stack(target)
