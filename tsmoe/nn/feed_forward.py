"""The gated feed-forward network, dense or as an always-on shared part of an expert layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Two gates and a way back: `down(silu(gate(x)) * up(x))`.

    Source: GLU variants (arXiv 2002.05202); Ours for Time Tracker, whose activation is not stated.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        # One matrix for gate and up: one pass over the tokens instead of two.
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, up = self.gate_up(tokens).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
