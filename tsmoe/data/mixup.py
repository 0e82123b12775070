"""Mix windows of different series, so that a small corpus teaches more than its own curves.

Shapes: B windows, C variates, L points of a window; 1 kept for broadcasting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsmoe.batch import WindowBatch

# Mixed windows are in units of spread: a partner that hardly moves must not be blown up to noise.
_SMALLEST_SPREAD = 1e-6


def mix_windows(batch: WindowBatch, partners: WindowBatch, share_B: Tensor) -> WindowBatch:
    """Replace windows by weighted sums of themselves and their partners, each standardised.

    Args:
        batch: windows, as cut.
        partners: as many others, with the same length.
        share_B: weight of each partner, 0 to leave a window as it is (in its own unit); negative
            turns the partner upside down.

    Source: TSMixup (Chronos, arXiv 2403.07815, section 4.1). Departure: two windows, standardised
    instead of mean-scaled, the partner possibly negated.
    """
    share_B11 = share_B[:, None, None]
    is_mixed_B11 = share_B11 != 0
    mixed_BCL = (1 - share_B11.abs()) * _standardised(batch) + share_B11 * _standardised(partners)
    observed_BCL = batch.observed_BCL & (partners.observed_BCL | ~is_mixed_B11)
    values_BCL = torch.where(is_mixed_B11, mixed_BCL, batch.values_BCL)
    return WindowBatch(
        values_BCL=torch.where(observed_BCL, values_BCL, 0),
        observed_BCL=observed_BCL,
        is_target_BCL=batch.is_target_BCL & observed_BCL,
        series_ids_B=batch.series_ids_B,
    )


def _standardised(batch: WindowBatch) -> Tensor:
    count_BC1 = batch.observed_BCL.sum(-1, keepdim=True).clamp(min=1)
    mean_BC1 = batch.values_BCL.sum(-1, keepdim=True) / count_BC1
    centred_BCL = torch.where(batch.observed_BCL, batch.values_BCL - mean_BC1, 0)
    spread_BC1 = (centred_BCL.square().sum(-1, keepdim=True) / count_BC1).sqrt()
    return centred_BCL / spread_BC1.clamp(min=_SMALLEST_SPREAD)
