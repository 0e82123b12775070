"""Forecasts that every model must beat: the last value and the last season.

The least squares baseline stands in `linear.py`. All take scaled windows with NaN where nothing
was observed; where a context has no observation at all they answer 0, the mean of the train part.

Shapes: B windows, C variates, L context steps, Q prediction steps, Y whole seasons in the
context, M steps of one season.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tsmoe.errors import ConfigError

_DAY_MINUTES = 24 * 60
_SEASON_OF_UNIT = {"D": 7, "B": 5, "W": 52, "M": 12, "Q": 4, "Y": 1}
_MINUTES_OF_UNIT = {"min": 1, "T": 1, "h": 60, "H": 60}


class Baseline(Protocol):
    """A forecast that needs no trained package."""

    def forecast(self, context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
        """Return mean_BCQ, finite for every window."""
        ...


class Naive:
    """Repeats the last observed value."""

    def forecast(self, context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
        """Return mean_BCQ, constant along Q."""
        return np.repeat(last_observed(context_BCL)[..., None], prediction_length, axis=-1)


@dataclass(frozen=True)
class SeasonalNaive:
    """Repeats the last season.

    A step that was not observed in the last season is taken from the last season that has it;
    failing all, it is the last observed value.
    """

    season: int
    """Steps in one season."""

    def forecast(self, context_BCL: np.ndarray, prediction_length: int) -> np.ndarray:
        """Return mean_BCQ, periodic along Q.

        Raises:
            ConfigError: if the context is shorter than one season.
        """
        context_length = context_BCL.shape[-1]
        check_season(self.season, context_length)
        num_seasons = context_length // self.season
        recent_BCL = context_BCL[..., context_length - num_seasons * self.season :]
        seasons_BCYM = recent_BCL.reshape(*recent_BCL.shape[:-1], num_seasons, self.season)
        season_BCM = seasons_BCYM[..., -1, :].copy()
        for y in range(num_seasons - 2, -1, -1):
            missing_BCM = np.isnan(season_BCM)
            if not missing_BCM.any():
                break
            season_BCM[missing_BCM] = seasons_BCYM[..., y, :][missing_BCM]
        season_BCM = np.where(
            np.isnan(season_BCM), last_observed(context_BCL)[..., None], season_BCM
        )
        return season_BCM[..., np.arange(prediction_length) % self.season]


def season_length(freq: str | None) -> int | None:
    """Find the usual season of a sampling interval; None where there is no usual one.

    Intervals of minutes and hours that divide a day have the day (15min: 96, h: 24), days and
    business days the week, weeks, months and quarters the year.

    Args:
        freq: a pandas alias such as "h", "15min", "D", "MS" or "W-SUN".
    """
    match = re.fullmatch(r"(\d*)([A-Za-z]+)(-[A-Z]+)?", freq or "")
    if match is None:
        return None
    multiple, unit = int(match[1] or 1), match[2]
    if unit in _MINUTES_OF_UNIT:
        minutes = multiple * _MINUTES_OF_UNIT[unit]
        return _DAY_MINUTES // minutes if minutes and _DAY_MINUTES % minutes == 0 else None
    calendar = re.fullmatch(r"B?([MQY])[SE]", unit)  # (business) start or end of the period
    unit = calendar[1] if calendar is not None else unit
    return _SEASON_OF_UNIT.get(unit) if multiple == 1 else None


def check_season(season: int, context_length: int) -> None:
    """Refuse a season that does not fit into the context.

    Raises:
        ConfigError: naming both.
    """
    if not 1 <= season <= context_length:
        raise ConfigError(
            f"the season ({season} steps) must lie between 1 and the context ({context_length} "
            "steps) for the seasonal naive baseline; lengthen the context or give --season"
        )


def last_observed(context_BCL: np.ndarray) -> np.ndarray:
    """Pick the last value of each context that is not NaN; 0 where there is none."""
    observed_BCL = np.isfinite(context_BCL)
    steps_back_BC = np.argmax(observed_BCL[..., ::-1], axis=-1)
    place_BC = context_BCL.shape[-1] - 1 - steps_back_BC
    value_BC = np.take_along_axis(context_BCL, place_BC[..., None], axis=-1)[..., 0]
    return np.where(observed_BCL.any(axis=-1), value_BC, 0.0).astype(context_BCL.dtype)


def fill_gaps(context_BCL: np.ndarray) -> np.ndarray:
    """Interpolate linearly between observed steps and repeat the outermost ones at the edges.

    Uses the context only, so that nothing of the target leaks in. 0 where nothing is observed.
    """
    observed_BCL = np.isfinite(context_BCL)
    has_gap_BC = ~observed_BCL.all(axis=-1)
    if not has_gap_BC.any():
        return context_BCL
    filled_BCL = context_BCL.copy()
    filled_BCL[has_gap_BC] = _fill_rows(context_BCL[has_gap_BC], observed_BCL[has_gap_BC])
    return filled_BCL


def _fill_rows(values_RL: np.ndarray, observed_RL: np.ndarray) -> np.ndarray:
    length = values_RL.shape[-1]
    steps_L = np.arange(length)
    before_RL = np.maximum.accumulate(np.where(observed_RL, steps_L, -1), axis=-1)
    reverse_RL = np.where(observed_RL, steps_L, length)[:, ::-1]
    after_RL = np.minimum.accumulate(reverse_RL, axis=-1)[:, ::-1]
    # At an edge only one neighbour exists: both become that one and the weight below is 0.
    left_RL = np.where(before_RL < 0, after_RL, before_RL)
    right_RL = np.where(after_RL >= length, before_RL, after_RL)
    is_empty_R = ~observed_RL.any(axis=-1)
    left_RL[is_empty_R], right_RL[is_empty_R] = 0, 0
    zeroed_RL = np.where(observed_RL, values_RL, 0.0)
    left_value_RL = np.take_along_axis(zeroed_RL, left_RL, axis=-1)
    right_value_RL = np.take_along_axis(zeroed_RL, right_RL, axis=-1)
    weight_RL = (steps_L - left_RL) / np.maximum(right_RL - left_RL, 1)
    weight_RL = np.where(right_RL > left_RL, weight_RL, 0.0)
    return left_value_RL + weight_RL * (right_value_RL - left_value_RL)
