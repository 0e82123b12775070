"""Errors of forecasts, summed over windows in float64; targets that are not observed do not count.

Shapes: B windows, C variates, Q prediction steps, K quantile levels.
"""

from dataclasses import dataclass

import numpy as np

from tsmoe.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ForecastScores:
    """Errors of one model over all observed targets of all windows and variates."""

    mse: float
    mae: float
    mase: float | None
    """Absolute error in units of the seasonal naive error of the train part; None if that is 0."""
    crps: float | None
    """Mean weighted quantile loss; None for a point forecast."""
    variate_mse: tuple[float | None, ...]
    """Per variate; None where no target is observed."""
    observed_fraction: float
    """Share of the targets that were observed, hence counted."""
    relative_mase: float | None = None
    """Over that of the seasonal naive forecast; None where it is not asked for."""
    relative_crps: float | None = None
    """The same of the CRPS."""

    def to_json_dict(self) -> dict[str, float]:
        """Name the errors as in every result file; those that do not apply are left out."""
        named = {
            "mse": self.mse,
            "mae": self.mae,
            "mase": self.mase,
            "crps": self.crps,
            "relative_mase": self.relative_mase,
            "relative_crps": self.relative_crps,
        }
        return {name: value for name, value in named.items() if value is not None}


class ForecastMetrics:
    """Running sums of the errors of one model.

    `crps` is the mean over levels of 2 * sum(pinball loss) / sum(|target|), which tends to the
    weighted continuous ranked probability score as the levels become dense.

    Args:
        seasonal_error_C: mean absolute seasonal difference of each variate, from
            `seasonal_differences`; variates with 0 or NaN are left out of `mase`.
        quantile_levels: () for a point forecast.

    Source: mase, Hyndman and Koehler 2006 (scaled by the train part, as there); crps as
    `mean_weighted_sum_quantile_loss` in GluonTS (arXiv 1906.05264).
    """

    def __init__(
        self, seasonal_error_C: np.ndarray, *, quantile_levels: tuple[float, ...] = ()
    ) -> None:
        num_variates = len(seasonal_error_C)
        self._seasonal_error_C = np.asarray(seasonal_error_C, dtype=np.float64)
        self._levels_K = np.asarray(quantile_levels, dtype=np.float64)
        self._squared_C = np.zeros(num_variates)
        self._absolute_C = np.zeros(num_variates)
        self._observed_C = np.zeros(num_variates, dtype=np.int64)
        self._target_magnitude = 0.0
        self._pinball_K = np.zeros(len(quantile_levels))
        self._targets = 0

    def update(
        self,
        mean_BCQ: np.ndarray,
        target_BCQ: np.ndarray,
        *,
        quantiles_BCQK: np.ndarray | None = None,
    ) -> None:
        """Add the windows of one block; targets may be NaN, forecasts may not."""
        observed_BCQ = np.isfinite(target_BCQ)
        target_BCQ = np.where(observed_BCQ, target_BCQ, 0.0).astype(np.float64)
        error_BCQ = np.where(observed_BCQ, mean_BCQ - target_BCQ, 0.0)
        self._squared_C += np.square(error_BCQ).sum(axis=(0, 2))
        self._absolute_C += np.abs(error_BCQ).sum(axis=(0, 2))
        self._observed_C += observed_BCQ.sum(axis=(0, 2))
        self._target_magnitude += float(np.abs(target_BCQ).sum())
        self._targets += observed_BCQ.size
        if quantiles_BCQK is not None:
            for k, level in enumerate(self._levels_K):  # one level at a time: K times less memory
                short_BCQ = np.where(observed_BCQ, target_BCQ - quantiles_BCQK[..., k], 0.0)
                self._pinball_K[k] += np.maximum(level * short_BCQ, (level - 1) * short_BCQ).sum()

    def scores(self) -> ForecastScores:
        """Divide the sums by what was counted.

        Raises:
            DataError: if no target was observed.
        """
        observed = int(self._observed_C.sum())
        if observed == 0:
            raise DataError("no observed target in the test part; nothing can be compared")
        has_scale_C = self._seasonal_error_C > 0  # False for NaN too
        scaled = self._absolute_C[has_scale_C] / self._seasonal_error_C[has_scale_C]
        scaled_count = int(self._observed_C[has_scale_C].sum())
        has_crps = len(self._levels_K) > 0 and self._target_magnitude > 0
        return ForecastScores(
            mse=float(self._squared_C.sum() / observed),
            mae=float(self._absolute_C.sum() / observed),
            mase=float(scaled.sum() / scaled_count) if scaled_count else None,
            crps=float(2 * self._pinball_K.mean() / self._target_magnitude) if has_crps else None,
            variate_mse=tuple(
                float(squared / count) if count else None
                for squared, count in zip(self._squared_C, self._observed_C, strict=True)
            ),
            observed_fraction=observed / self._targets,
        )


def seasonal_differences(values_LC: np.ndarray, season: int) -> np.ndarray:
    """Average |value - value one season before| per variate: the scale of `mase`.

    Returns:
        seasonal_error_C: NaN where no such pair is observed.
    """
    difference_LC = np.abs(values_LC[season:].astype(np.float64) - values_LC[:-season])
    counted_LC = np.isfinite(difference_LC)
    count_C = counted_LC.sum(axis=0)
    total_C = np.where(counted_LC, difference_LC, 0.0).sum(axis=0)
    return np.divide(total_C, count_C, out=np.full(len(count_C), np.nan), where=count_C > 0)


def interpolate_levels(
    quantiles: np.ndarray, levels: tuple[float, ...], asked: tuple[float, ...]
) -> np.ndarray:
    """Take the asked levels, linearly between the two of the head that are next to each.

    Args:
        quantiles: the last axis is that of `levels`.
        levels: of the head, increasing; beyond the outermost, these count.

    Returns:
        The same with an axis of `asked` at the end.
    """
    places = np.interp(asked, levels, np.arange(len(levels)))
    below = np.floor(places).astype(int)
    above = np.ceil(places).astype(int)
    weight = (places - below).astype(np.float32)
    return quantiles[..., below] + weight * (quantiles[..., above] - quantiles[..., below])
