"""Hide patches of the context while training, so that a model learns to look past a gap.

At the end of a context a gap is the future: a model that has learned to forecast behind hidden
patches forecasts several in one pass, instead of taking its own forecasts for observations.

Shapes: B windows, C variates, L points of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsmoe.data.order import Integers, uniform

# Chance that a run of hidden patches begins behind a patch that is shown.
_START_CHANCE = 0.3


@dataclass(frozen=True, kw_only=True)
class PatchMask:
    """Which patches of a window are hidden: a function of the window's place in the order.

    Source: contiguous patch masking (TiRex, arXiv 2505.23719). Ours: runs no longer than what is
    forecast in one pass; never the first patch, as the scale of a window must be known.
    """

    context_length: int
    patch_length: int
    lookahead_patches: int
    """Patches that are forecast in one pass; runs of hidden ones are shorter by one."""

    def hide(self, observed_BCL: Tensor, positions: Integers, key: np.uint64) -> Tensor:
        """Return the mask of what the model may see; targets stay what they are.

        Args:
            observed_BCL: of windows whose context is at their beginning.
            positions: of the windows in the order of the run.
            key: of the order.
        """
        if self.lookahead_patches == 1:
            return observed_BCL
        count = self.context_length // self.patch_length
        remaining = np.zeros(len(positions), dtype=np.int64)
        is_shown = np.ones((len(positions), observed_BCL.shape[-1]), dtype=bool)
        may_begin = np.ones(len(positions), dtype=bool)
        offset = self.context_length - count * self.patch_length
        for patch in range(1, count):
            chance, length = uniform(positions * count + patch, key)
            begins = may_begin & (chance < _START_CHANCE)
            drawn = 1 + np.floor(length * (self.lookahead_patches - 1)).astype(np.int64)
            remaining = np.where(begins, drawn, remaining)
            is_hidden = remaining > 0
            first = offset + patch * self.patch_length
            is_shown[is_hidden, first : first + self.patch_length] = False
            remaining = np.maximum(remaining - 1, 0)
            may_begin = ~is_hidden
        return observed_BCL & torch.from_numpy(is_shown)[:, None]
