"""Comparing values: is one stretch of a series another one, scaled and shifted?

Hashes only propose pairs; what counts is decided here. Two stretches match if a scale (not 0) and
a shift carry one into the other, with the same steps missing, to a thousandth of the spread of
the values, plus what rounding to float32 may have done to either.

B pairs of windows, W values of a window
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-3
"""In units of the standard deviation of the window, and of the distance from its mean."""
_ROUNDING = 4 * 2.0**-24  # two numbers of float32, each rounded, with as much again to spare
_MAX_ROUNDING = 0.05
"""Where rounding may have moved values by more than this share of their spread, nothing is sure."""
_STEPS_AT_ONCE = 2**16


@dataclass(frozen=True)
class WindowFits:
    """How the second windows of pairs follow from the first; one entry per pair."""

    scale_B: NDArray[np.float64]
    shift_B: NDArray[np.float64]
    loc_B: NDArray[np.float64]
    """Mean of the second window."""
    spread_B: NDArray[np.float64]
    """Its standard deviation."""
    agrees_B: NDArray[np.bool_]
    """Whether the pair matches; the other numbers mean nothing where it does not."""

    def __getitem__(self, index: int) -> "LinearMap":
        return LinearMap(
            scale=float(self.scale_B[index]),
            shift=float(self.shift_B[index]),
            loc=float(self.loc_B[index]),
            spread=float(self.spread_B[index]),
        )


@dataclass(frozen=True)
class LinearMap:
    """second = scale * first + shift, learnt from one window."""

    scale: float
    shift: float
    loc: float
    spread: float

    def agreement(self, first: np.ndarray, second: np.ndarray) -> NDArray[np.bool_]:
        """Whether each step of the second array is that of the first; both missing is agreement."""
        agrees = np.empty(len(first), np.bool_)
        for start in range(0, len(first), _STEPS_AT_ONCE):
            piece = slice(start, start + _STEPS_AT_ONCE)
            agrees[piece] = self._agreement(
                first[piece].astype(np.float64), second[piece].astype(np.float64)
            )
        return agrees

    def _agreement(self, first: np.ndarray, second: np.ndarray) -> NDArray[np.bool_]:
        scaled = self.scale * first
        allowed = TOLERANCE * (self.spread + np.abs(second - self.loc))
        allowed += _ROUNDING * (np.abs(scaled) + np.abs(second) + abs(self.shift))
        agrees: NDArray[np.bool_] = np.abs(second - scaled - self.shift) <= allowed
        agrees |= np.isnan(first) & np.isnan(second)
        return agrees


def signatures(rows_BW: np.ndarray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Boil windows down to a number that two matching ones have in common.

    It is a weighted sum of the standardised values, without its sign, from 0 to the root of W.

    Returns:
        signature_B, and slack_B: by how much those of two matching windows may differ if the other
        one is rounded as much.
    """
    values_BW = rows_BW.astype(np.float64)
    observed_BW = ~np.isnan(values_BW)
    values_BW[~observed_BW] = 0.0
    count_B = np.maximum(observed_BW.sum(axis=1), 1)
    size_B = np.abs(values_BW).max(axis=1)
    values_BW -= (values_BW.sum(axis=1) / count_B)[:, None]
    values_BW[~observed_BW] = 0.0
    spread_B = np.sqrt(np.einsum("bw,bw->b", values_BW, values_BW) / count_B)
    spread_B[spread_B == 0.0] = 1.0
    window = rows_BW.shape[1]
    weights_W = np.cos(np.arange(window) ** 2)  # no pattern that a recording would share
    weights_W /= np.linalg.norm(weights_W)
    signature_B = np.abs(values_BW @ weights_W) / spread_B
    # Each value may be off by the tolerance, and the sum by that times the sum of the weights;
    # the location and the spread move as well: half as much again, and twice for two windows.
    rounding_B = np.minimum(_ROUNDING * size_B / spread_B, _MAX_ROUNDING)
    slack_B = 3.0 * np.abs(weights_W).sum() * (TOLERANCE + rounding_B)
    return signature_B, slack_B


def fit_windows(first_BW: np.ndarray, second_BW: np.ndarray) -> WindowFits:
    """Fit each second window to the first by least squares, and say which pairs match."""
    first_BW = first_BW.astype(np.float64)
    second_BW = second_BW.astype(np.float64)
    observed_BW = ~np.isnan(first_BW)
    agrees_B = (observed_BW == ~np.isnan(second_BW)).all(axis=1)
    count_B = np.maximum(observed_BW.sum(axis=1), 1)
    hidden_BW = ~observed_BW | np.isnan(second_BW)
    first_BW[hidden_BW] = 0.0
    second_BW[hidden_BW] = 0.0
    size_first_B = np.abs(first_BW).max(axis=1)
    size_second_B = np.abs(second_BW).max(axis=1)

    loc_first_B = first_BW.sum(axis=1) / count_B
    loc_second_B = second_BW.sum(axis=1) / count_B
    first_BW -= loc_first_B[:, None]
    second_BW -= loc_second_B[:, None]
    first_BW[hidden_BW] = 0.0
    second_BW[hidden_BW] = 0.0
    energy_B = np.einsum("bw,bw->b", first_BW, first_BW)
    spread_B = np.sqrt(np.einsum("bw,bw->b", second_BW, second_BW) / count_B)
    is_flat_B = energy_B == 0.0
    products_B = np.einsum("bw,bw->b", first_BW, second_BW)
    scale_B = products_B / np.where(is_flat_B, 1.0, energy_B)
    shift_B = loc_second_B - scale_B * loc_first_B

    rounding_B = _ROUNDING * (np.abs(scale_B) * size_first_B + size_second_B)
    worst_B = np.abs(second_BW - scale_B[:, None] * first_BW).max(axis=1)
    agrees_B &= ~is_flat_B & (scale_B != 0.0) & (rounding_B <= _MAX_ROUNDING * spread_B)
    agrees_B &= worst_B <= TOLERANCE * spread_B + rounding_B
    return WindowFits(scale_B, shift_B, loc_second_B, spread_B, agrees_B)


def extend_match(
    first: np.ndarray, second: np.ndarray, *, at: tuple[int, int], length: int, fit: LinearMap
) -> tuple[int, int]:
    """Follow a match to both sides, as far as the values agree.

    Args:
        first: a whole series.
        second: another.
        at: offset of the matching window in each.
        length: values of the window.
        fit: what carries the first into the second there.

    Returns:
        Offset in `first` where the common stretch begins and where it ends; steps beyond the window
        count up to the last that is observed.
    """
    place_first, place_second = at
    back = min(place_first, place_second)
    ahead = min(len(first) - place_first, len(second) - place_second) - length
    first_side = first[place_first - back : place_first][::-1]
    second_side = second[place_second - back : place_second][::-1]
    begin = place_first - _agreeing_steps(first_side, second_side, fit)
    end = place_first + length
    first_side = first[end : end + ahead]
    second_side = second[place_second + length : place_second + length + ahead]
    return begin, end + _agreeing_steps(first_side, second_side, fit)


def _agreeing_steps(first: np.ndarray, second: np.ndarray, fit: LinearMap) -> int:
    """Count the steps from the start on that agree, up to the last one that is observed."""
    count, step = 0, 256
    while count < len(first):
        agrees = fit.agreement(first[count : count + step], second[count : count + step])
        if not agrees.all():
            count += int(np.argmin(agrees))
            break
        count += len(agrees)
        step = min(2 * step, _STEPS_AT_ONCE)
    while count and np.isnan(first[count - 1]):
        count -= 1
    return count
