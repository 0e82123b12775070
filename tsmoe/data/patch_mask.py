"""Hide patches of the context while training, so that a model learns to look past a gap.

At the end of a context a gap is the future: a model that has learned to forecast behind hidden
patches forecasts several in one pass, instead of taking its own forecasts for observations.

Shapes: B windows, C variates, L points of a window, N patches of its context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsmoe.data.permutation import Integers, uniform
from tsmoe.nn.spans import NO_SERIES

# Chance that a run of hidden patches begins behind a patch that is shown.
_START_CHANCE = 0.3


@dataclass(frozen=True, kw_only=True)
class PatchMask:
    """Which patches of a window are hidden: a function of the window's place in the order.

    Source: contiguous patch masking (TiRex, arXiv 2505.23719). Ours: runs no longer than what is
    forecast in one pass; never the first patch, as the scale of a window must be known. Each series
    of a packed window is treated as a window.
    """

    context_length: int
    patch_length: int
    lookahead_patches: int
    """Patches that are forecast in one pass; runs of hidden ones are shorter by one."""

    def hide(
        self,
        observed_BCL: Tensor,
        positions: Integers,
        key: np.uint64,
        series_BCN: Tensor | None = None,
    ) -> Tensor:
        """Return the mask of what the model may see; targets stay what they are.

        Args:
            observed_BCL: of windows whose context is at their beginning.
            positions: of the windows in the order of the run.
            key: of the order.
            series_BCN: of packed windows, see `WindowBatch`; C = 1.
        """
        if self.lookahead_patches == 1:
            return observed_BCL
        count = self.context_length // self.patch_length
        is_first_BN = np.arange(count) == np.zeros((len(positions), 1))
        if series_BCN is not None:
            is_first_BN |= _first_patches(series_BCN[:, 0].numpy(), count)
        is_hidden_BN = self._hidden(positions, key, is_first_BN)
        first = self.context_length - count * self.patch_length
        is_shown_BL = np.ones((len(positions), observed_BCL.shape[-1]), dtype=bool)
        is_shown_BL[:, first : self.context_length] = np.repeat(
            ~is_hidden_BN, self.patch_length, axis=1
        )
        return observed_BCL & torch.from_numpy(is_shown_BL)[:, None]

    def _hidden(
        self, positions: Integers, key: np.uint64, is_first_BN: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Return the patches of each window that are hidden, as (B, N)."""
        count = is_first_BN.shape[1]
        chance_NB, length_NB = uniform(positions * count + np.arange(count)[:, None], key)
        drawn_NB = 1 + np.floor(length_NB * (self.lookahead_patches - 1)).astype(np.int64)
        begins_NB = chance_NB < _START_CHANCE
        is_hidden_NB = np.zeros((count, len(positions)), dtype=bool)
        remaining_B = np.zeros(len(positions), dtype=np.int64)
        for patch in range(1, count):
            begins_B = begins_NB[patch] & ~is_hidden_NB[patch - 1]
            remaining_B = np.where(begins_B, drawn_NB[patch], remaining_B)
            remaining_B[is_first_BN[:, patch]] = 0
            np.greater(remaining_B, 0, out=is_hidden_NB[patch])
            remaining_B -= is_hidden_NB[patch]
        return is_hidden_NB.T


def _first_patches(series_BN: Integers, count: int) -> NDArray[np.bool_]:
    """Return for patches that do not overlap in which of them a series begins."""
    is_first_BN = series_BN != NO_SERIES
    is_first_BN[:, 1:] &= series_BN[:, 1:] != series_BN[:, :-1]
    rows, tokens = is_first_BN.nonzero()
    tokens_per_patch = (series_BN.shape[1] - 1) // (count - 1) if count > 1 else 1
    is_first = np.zeros((len(series_BN), count), dtype=bool)
    is_first[rows, tokens // tokens_per_patch] = True
    return is_first
