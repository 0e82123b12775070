"""Take location and scale out of each window, so that one model serves series of any unit.

Every token carries the statistics that it was normalised with; its forecast is scaled back by the
same. Shapes: B windows, C variates, L points, N patches, 1 kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsmoe.config import Section

# Relative to the level of the series: float32 resolves about 1e-7 of it, so a spread below this
# is rounding, not signal.
_RELATIVE_FLOOR = 1e-6
# Keeps an all-zero window from dividing by zero; far below any unit in use.
_ABSOLUTE_FLOOR = 1e-15


@dataclass(frozen=True, kw_only=True)
class InstanceNormConfig(Section):
    """Where the statistics of a token come from."""

    mode: Literal["window", "prefix"] = "prefix"
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
    values_BCL: Tensor, observed_BCL: Tensor, ends: Tensor, *, mode: Literal["window", "prefix"]
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
    safe_count_BCN = count_BCN.clamp(min=1)
    mean_BCN = sum_BCN / safe_count_BCN
    std_BCN = (square_BCN / safe_count_BCN - mean_BCN.square()).clamp(min=0).sqrt()
    # Before the first observation its value is not known yet.
    loc_BCN = torch.where(count_BCN > 0, mean_BCN + first_BC1, 0)
    floor_BCN = (_RELATIVE_FLOOR * loc_BCN.abs()).clamp(min=_ABSOLUTE_FLOOR)
    return InstanceStatistics(
        loc_BCN1=loc_BCN.float()[..., None],
        scale_BCN1=std_BCN.maximum(floor_BCN).float()[..., None],
        is_degenerate_BCN=std_BCN <= floor_BCN,
    )
