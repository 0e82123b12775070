"""Measures of the M4 competition: sMAPE, MASE, and both against the Naive2 forecast (OWA).

All take whole series of positive, finite values; nothing is masked. The season is 24 for hourly
and 1 for weekly series.

Shapes: L steps of the train part, Q prediction steps, M steps of one season.

Source: Makridakis, Spiliotis, Assimakopoulos 2020, "The M4 Competition: 100,000 time series and 61
forecasting methods", Int. J. Forecasting 36(1), section 2.2 and the competition's R code.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

_NORMAL_QUANTILE = 1.645  # two-sided 90 %
_MIN_SEASONS = 3  # a shorter train part is taken as not seasonal


@dataclass(frozen=True, kw_only=True)
class M4Scores:
    """Errors of one method over a set of series, each series with equal weight."""

    smape: float
    """In percent, between 0 and 200."""
    mase: float
    owa: float
    """Below 1 is better than Naive2."""
    naive2_smape: float
    naive2_mase: float

    def to_json_dict(self) -> dict[str, float]:
        """Name the errors as in every result file."""
        return asdict(self)


def m4_scores(
    trains: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    forecasts: Sequence[np.ndarray],
    *,
    season: int,
) -> M4Scores:
    """Compare forecasts of a set of series with the targets and with Naive2.

    Args:
        trains: one train_L per series, of any lengths.
        targets: one target_Q per series.
        forecasts: one forecast_Q per series, in the same order.

    Raises:
        ValueError: if the set is empty, the numbers of series differ, or a series is refused by
            `smape`, `mase` or `naive2`; names the place of the series in the set.
    """
    if not len(trains) == len(targets) == len(forecasts) or len(trains) == 0:
        raise ValueError(
            f"expected as many train parts, targets and forecasts, at least one, got {len(trains)},"
            f" {len(targets)} and {len(forecasts)}"
        )
    errors = []
    for i, (train_L, target_Q, forecast_Q) in enumerate(
        zip(trains, targets, forecasts, strict=True)
    ):
        try:
            naive2_Q = naive2(train_L, len(target_Q), season)
            errors.append(
                (
                    smape(target_Q, forecast_Q),
                    mase(target_Q, forecast_Q, train_L=train_L, season=season),
                    smape(target_Q, naive2_Q),
                    mase(target_Q, naive2_Q, train_L=train_L, season=season),
                )
            )
        except ValueError as error:
            raise ValueError(f"series {i} of {len(trains)}: {error}") from error
    mean_smape, mean_mase, naive2_smape, naive2_mase = (float(e) for e in np.mean(errors, axis=0))
    return M4Scores(
        smape=mean_smape,
        mase=mean_mase,
        owa=owa(mean_smape, mean_mase, naive2_smape=naive2_smape, naive2_mase=naive2_mase),
        naive2_smape=naive2_smape,
        naive2_mase=naive2_mase,
    )


def owa(smape: float, mase: float, *, naive2_smape: float, naive2_mase: float) -> float:
    """Average both errors relative to those of Naive2.

    Ratios of means over the whole set of series, not means of ratios.

    Raises:
        ValueError: if an error of Naive2 is 0, where nothing can be relative to it.
    """
    if naive2_smape <= 0 or naive2_mase <= 0:
        raise ValueError(
            f"OWA needs positive errors of Naive2, got sMAPE {naive2_smape} and MASE {naive2_mase}"
        )
    return (smape / naive2_smape + mase / naive2_mase) / 2


def smape(target_Q: np.ndarray, forecast_Q: np.ndarray) -> float:
    """Average 200 |y - f| / (|y| + |f|), in percent.

    Ours: a step where both are 0 counts 0; the competition has no such step.

    Raises:
        ValueError: if the lengths differ, or a value is missing or not finite.
    """
    target_Q, forecast_Q = _check_pair(target_Q, forecast_Q)
    magnitude_Q = np.abs(target_Q) + np.abs(forecast_Q)
    error_Q = np.abs(target_Q - forecast_Q)
    ratio_Q = np.divide(error_Q, magnitude_Q, out=np.zeros_like(error_Q), where=magnitude_Q > 0)
    return float(200 * ratio_Q.mean())


def mase(
    target_Q: np.ndarray, forecast_Q: np.ndarray, *, train_L: np.ndarray, season: int
) -> float:
    """Average the absolute error in units of the seasonal naive error of the train part.

    Raises:
        ValueError: if the lengths differ, a value is not finite, the train part is not longer
            than one season, or it repeats its season exactly, so that the unit is 0.
    """
    target_Q, forecast_Q = _check_pair(target_Q, forecast_Q)
    train_L = _check_series(train_L, name="train_L")
    _check_season(season)
    if len(train_L) <= season:
        raise ValueError(
            f"train_L ({len(train_L)} steps) must be longer than one season ({season} steps)"
        )
    scale = float(np.abs(train_L[season:] - train_L[:-season]).mean())
    if scale == 0:
        raise ValueError(
            f"train_L repeats with a season of {season} without any change; MASE has no unit there"
        )
    return float(np.abs(target_Q - forecast_Q).mean() / scale)


def naive2(train_L: np.ndarray, prediction_length: int, season: int) -> np.ndarray:
    """Repeat the last value, seasonally adjusted where the train part is seasonal.

    The train part is seasonal where its autocorrelation at one season is beyond the 90 % limit.
    Then it is divided by the indices of a classical multiplicative decomposition, its last value
    is repeated, and the indices of the coming steps are multiplied back.

    Returns:
        forecast_Q

    Raises:
        ValueError: if train_L is empty or not finite, is seasonal with values that are not
            positive, or a length is below 1.
    """
    train_L = _check_series(train_L, name="train_L")
    _check_season(season)
    if prediction_length < 1:
        raise ValueError(f"prediction_length must be at least 1, got {prediction_length}")
    if not _is_seasonal(train_L, season):
        return np.full(prediction_length, train_L[-1])
    if train_L.min() <= 0:
        raise ValueError(
            "train_L must be positive for a multiplicative season, got a minimum of "
            f"{train_L.min()}"
        )
    index_M = _seasonal_indices(train_L, season)
    level = train_L[-1] / index_M[(len(train_L) - 1) % season]
    return level * index_M[(len(train_L) + np.arange(prediction_length)) % season]


def _is_seasonal(train_L: np.ndarray, season: int) -> bool:
    """Test the autocorrelation at one season against its limit (Bartlett's formula)."""
    if season == 1 or len(train_L) < _MIN_SEASONS * season:
        return False
    centred_L = train_L - train_L.mean()
    variance = float(centred_L @ centred_L)
    if variance == 0:
        return False
    correlation = np.array(
        [float(centred_L[lag:] @ centred_L[:-lag]) / variance for lag in range(1, season + 1)]
    )
    limit = _NORMAL_QUANTILE * np.sqrt((1 + 2 * np.square(correlation[:-1]).sum()) / len(train_L))
    return bool(abs(correlation[-1]) > limit)


def _seasonal_indices(train_L: np.ndarray, season: int) -> np.ndarray:
    """Average the ratios to a centred moving average per step of the season; their mean is 1."""
    weights = np.ones(season + 1 - season % 2)
    if season % 2 == 0:
        weights[[0, -1]] = 0.5  # an even season has no middle step
    trend = np.convolve(train_L, weights / season, mode="valid")
    first = season // 2  # the trend lacks half a season on both sides
    ratio = train_L[first : first + len(trend)] / trend
    step = (first + np.arange(len(trend))) % season
    index_M = np.bincount(step, ratio, minlength=season) / np.bincount(step, minlength=season)
    return index_M / index_M.mean()


def _check_pair(target_Q: np.ndarray, forecast_Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    target_Q = _check_series(target_Q, name="target_Q")
    forecast_Q = _check_series(forecast_Q, name="forecast_Q")
    if len(target_Q) != len(forecast_Q):
        raise ValueError(
            f"target_Q ({len(target_Q)} steps) and forecast_Q ({len(forecast_Q)} steps) must have "
            "equal lengths"
        )
    return target_Q, forecast_Q


def _check_series(values: np.ndarray, *, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have one axis and at least one step, got {values.shape}")
    broken = np.flatnonzero(~np.isfinite(values))
    if broken.size:
        raise ValueError(
            f"{name}: {broken.size} of {values.size} values are not finite, the first at step "
            f"{broken[0]} ({values[broken[0]]})"
        )
    return values


def _check_season(season: int) -> None:
    if season < 1:
        raise ValueError(f"season must be at least 1 step, got {season}")
