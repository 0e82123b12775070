"""Take location and scale out of each window, so that one model serves series of any unit.

Every token carries the statistics that it was normalised with; its forecast is scaled back by the
same. Shapes: B windows, C variates, L points, N patches, J steps of the patches' stride, Z points
of such a step, 1 kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsmoe.config import Section
from tsmoe.nn.spans import SeriesSpans

Mode = Literal["window", "prefix"]

# Relative to the level of the series: float32 resolves about 1e-7 of it, so a spread below this
# is rounding, not signal.
_RELATIVE_FLOOR = 1e-6
# Keeps an all-zero window from dividing by zero; far below any unit in use.
_ABSOLUTE_FLOOR = 1e-15


@dataclass(frozen=True, kw_only=True)
class InstanceNormConfig(Section):
    """Where the statistics of a token come from."""

    mode: Mode = "prefix"
    """`window`: the whole context (the paper's). `prefix`: the points up to the end of the token's
    own patch, so that no statistic knows the future while training."""


@dataclass(frozen=True, kw_only=True)
class InstanceStatistics:
    """Location and scale of each token."""

    loc_BCN1: Tensor
    scale_BCN1: Tensor
    is_degenerate_BCN: Tensor
    """True where all that was observed so far is constant, or nothing was observed: the scale is a
    floor then, and a target measured by it would be meaningless."""


def instance_statistics(
    values_BCL: Tensor, observed_BCL: Tensor, ends: Tensor, *, mode: Mode
) -> InstanceStatistics:
    """Compute mean and biased standard deviation over observed points.

    Args:
        values_BCL: points in any unit; ignored where not observed.
        observed_BCL: True where a value was recorded.
        ends: int64 of shape (N,), the number of points up to the end of each patch.
        mode: see `InstanceNormConfig`.

    Returns:
        The statistics per token; with nothing observed the location is 0.

    Source: Time Tracker (arXiv 2505.15151), instance norm. Departure: instead of adding 1e-5 to
    the variance, the scale has a floor relative to the level, so that a forecast in other units is
    the same forecast.
    """
    # Running sums of squares cancel in float32 when the level is far above the spread.
    masked_BCL = torch.where(observed_BCL, values_BCL, 0).double()
    # Measured from a constant that no later point can move: the first observed value.
    first_BC1 = masked_BCL.gather(-1, observed_BCL.long().argmax(-1, keepdim=True))
    centred_BCL = torch.where(observed_BCL, masked_BCL - first_BC1, 0)
    last = ends - 1
    if mode == "window":
        last = last[-1:].expand_as(last)
    count_BCN = observed_BCL.cumsum(-1)[..., last]
    sum_BCN = centred_BCL.cumsum(-1)[..., last]
    square_BCN = centred_BCL.square().cumsum(-1)[..., last]
    return _statistics(count_BCN, sum_BCN, square_BCN, first_BC1)


def packed_statistics(
    values_BCL: Tensor,
    observed_BCL: Tensor,
    spans: SeriesSpans,
    *,
    patch_length: int,
    patch_stride: int,
    mode: Mode,
) -> InstanceStatistics:
    """Compute mean and deviation of each series of packed windows, as if it were alone.

    Sums are products with a mask, not differences of running sums: of what another series holds
    not even a rounding error comes through. Tokens of no series have observed nothing.

    Args:
        values_BCL: points in any unit; ignored where not observed. L is that of the patches.
        observed_BCL: True where a value was recorded.
        spans: where each series lies.
        patch_length: points in a patch.
        patch_stride: points between the starts of neighbouring patches; divides `patch_length`.
        mode: see `InstanceNormConfig`; the window is that of the series.
    """
    count, steps_per_patch = spans.first_BCN.shape[-1], patch_length // patch_stride
    observed_BCJZ = observed_BCL.unflatten(-1, (-1, patch_stride))
    values_BCJZ = values_BCL.unflatten(-1, (-1, patch_stride))
    masked_BCJZ = torch.where(observed_BCJZ, values_BCJZ, 0).double()
    step_J = torch.arange(masked_BCJZ.shape[2], device=values_BCL.device)
    # Measured from the first observed value of the series, as above: that of the first step at or
    # after its first that has one.
    begin_BCJ = torch.where(spans.first_BCN == step_J[:count], step_J[:count], 0)
    begin_BCJ = (begin_BCJ * spans.is_token_BCN).cummax(-1).values
    begin_BCJ = torch.cat((begin_BCJ, begin_BCJ[..., -1:].expand(-1, -1, steps_per_patch - 1)), -1)
    known_BCJ = torch.where(observed_BCJZ.any(-1), step_J, len(step_J) - 1)
    known_BCJ = known_BCJ.flip(-1).cummin(-1).values.flip(-1)
    first_BCJ = masked_BCJZ.gather(-1, observed_BCJZ.long().argmax(-1, keepdim=True))[..., 0]
    first_BCJ = first_BCJ.gather(-1, known_BCJ.gather(-1, begin_BCJ))
    centred_BCJZ = torch.where(observed_BCJZ, masked_BCJZ - first_BCJ[..., None], 0)
    powers = (observed_BCJZ.double(), centred_BCJZ, centred_BCJZ.square())
    last_BCN = spans.last_BCN if mode == "window" else step_J[:count].expand_as(spans.last_BCN)
    is_seen_BCNJ = step_J >= spans.first_BCN[..., None]
    is_seen_BCNJ &= step_J < last_BCN[..., None] + steps_per_patch
    is_seen_BCNJ &= spans.is_token_BCN[..., None]
    sums_BCJ3 = torch.stack([power_BCJZ.sum(-1) for power_BCJZ in powers], dim=-1)
    count_BCN, sum_BCN, square_BCN = (is_seen_BCNJ.double() @ sums_BCJ3).unbind(-1)
    return _statistics(count_BCN, sum_BCN, square_BCN, first_BCJ[..., :count])


def _statistics(
    count_BCN: Tensor, sum_BCN: Tensor, square_BCN: Tensor, first_BCN: Tensor
) -> InstanceStatistics:
    """Turn sums of what was observed, measured from the first of it, into location and scale."""
    safe_count_BCN = count_BCN.clamp(min=1)
    mean_BCN = sum_BCN / safe_count_BCN
    std_BCN = (square_BCN / safe_count_BCN - mean_BCN.square()).clamp(min=0).sqrt()
    # Before the first observation its value is not known yet.
    loc_BCN = torch.where(count_BCN > 0, mean_BCN + first_BCN, 0)
    floor_BCN = (_RELATIVE_FLOOR * loc_BCN.abs()).clamp(min=_ABSOLUTE_FLOOR)
    return InstanceStatistics(
        loc_BCN1=loc_BCN.float()[..., None],
        scale_BCN1=std_BCN.maximum(floor_BCN).float()[..., None],
        is_degenerate_BCN=std_BCN <= floor_BCN,
    )
