"""Rotary position embedding on the time index.

Shapes: B windows, H heads, S tokens, N patches, 1 kept for broadcasting; d is the head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(time_index_S: Tensor, head_width: int, *, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of shape (S, d/2) in float32 for integer time indices.

    The index is that of the patch in time, equal for all variates, so that permuting variates
    permutes the output (a flattened index would not).

    Source: RoFormer (arXiv 2104.09864), as in Time Tracker (arXiv 2505.15151), Eq. (3).
    """
    half = head_width // 2
    exponent = torch.arange(half, device=time_index_S.device, dtype=torch.float32) / half
    angle_Sd = time_index_S.float()[:, None] * base**-exponent
    return angle_Sd.cos(), angle_Sd.sin()


def rotate(heads_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Turn each pair of coordinates by its angle, so that dot products see index differences."""
    first, second = heads_BHSd.chunk(2, dim=-1)
    cos_Sd, sin_Sd = cos_Sd.to(heads_BHSd.dtype), sin_Sd.to(heads_BHSd.dtype)
    return torch.cat((first * cos_Sd - second * sin_Sd, second * cos_Sd + first * sin_Sd), dim=-1)
