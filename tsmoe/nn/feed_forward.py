"""The gated feed-forward network, dense or as an always-on shared part of an expert layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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
        return self.down(gated_silu(self.gate_up(tokens)))


def gated_silu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` for the two halves of the last axis.

    Autograd's own version saves three tensors instead of one and joins the gradients of the halves
    by a copy.
    """
    if torch.compiler.is_compiling():
        # The compiler joins the steps by itself, and does not take results written into views.
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _GatedSiLU.apply(gate_up)


class _GatedSiLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(F.silu(gate), gradient, out=up_gradient)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient)
        return result
