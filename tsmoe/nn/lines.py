"""Straight lines over what is not observed.

Shapes: B windows, C variates, L points.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fill_by_lines(values_BCL: Tensor, observed_BCL: Tensor) -> Tensor:
    """Put a straight line between neighbours in time where nothing is observed.

    Before the first and after the last observed value that value goes on; a variate of which
    nothing is observed becomes 0. What is observed stays.
    """
    length = values_BCL.shape[-1]
    place_L = torch.arange(length, device=values_BCL.device)
    before_BCL = torch.where(observed_BCL, place_L, -1).cummax(-1).values
    after_BCL = torch.where(observed_BCL, place_L, length).flip(-1).cummin(-1).values.flip(-1)
    before_BCL = torch.where(before_BCL < 0, after_BCL, before_BCL)
    after_BCL = torch.where(after_BCL == length, before_BCL, after_BCL)
    before_BCL, after_BCL = (place.clamp(max=length - 1) for place in (before_BCL, after_BCL))
    known_BCL = torch.where(observed_BCL, values_BCL, 0)
    low_BCL, high_BCL = (known_BCL.gather(-1, place) for place in (before_BCL, after_BCL))
    gap_BCL = (after_BCL - before_BCL).clamp(min=1)
    share_BCL = ((place_L - before_BCL) / gap_BCL).clamp(0, 1)
    return low_BCL + (high_BCL - low_BCL) * share_BCL
