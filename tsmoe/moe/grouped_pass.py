"""All experts in one grouped product: for GPUs, and for many small experts anywhere.

Rows are copied in order of expert, once for each chosen expert, and their answers summed. Nothing
here waits for the device.

Shapes: U units, K experts per unit, M = U*K choices, N tokens per unit, R = M*N rows, D model
width, F feed-forward width, E experts of this rank; X = N*D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsmoe.moe.assignment import Assignment


def run_grouped(
    units_UND: Tensor,
    weights_UK: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    assignment: Assignment,
) -> Tensor:
    """Return each unit's weighted sum of its experts' answers."""
    rows_RD = gather_units(units_UND, assignment).flatten(0, 1)
    tokens_per_unit = units_UND.shape[1]
    offsets_E = (assignment.counts_E.cumsum(0) * tokens_per_unit).to(torch.int32)
    weights_R = take_weights(weights_UK, assignment)
    if tokens_per_unit > 1:
        weights_R = weights_R.repeat_interleave(tokens_per_unit)
    answers_RD = _GroupedExperts.apply(rows_RD, weights_R, gate_up_ED2F, down_EFD, offsets_E)
    return sum_units(answers_RD.unflatten(0, (-1, tokens_per_unit)), assignment)


def gather_units(units_UND: Tensor, assignment: Assignment) -> Tensor:
    """Copy each unit once per chosen expert, in order of expert."""
    return _ToExpertOrder.apply(units_UND, assignment)


def sum_units(answers_MND: Tensor, assignment: Assignment) -> Tensor:
    """Sum the answers to each unit."""
    return _FromExpertOrder.apply(answers_MND, assignment)


def take_weights(weights_UK: Tensor, assignment: Assignment) -> Tensor:
    """Put the weights of choices in order of expert."""
    return _Take.apply(weights_UK.flatten(), assignment.order_M, assignment.places)


class _GroupedExperts(Function):
    """Gated feed-forward experts on rows in order of expert, each answer times its weight.

    The weight is multiplied into the activation, where its gradient falls out of what the backward
    pass computes anyway; the answers need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        weights_R: Tensor,
        gate_up_ED2F: Tensor,
        down_EFD: Tensor,
        offsets_E: Tensor,
    ) -> Tensor:
        gate_up_R2F = F.grouped_mm(rows_RD, gate_up_ED2F, offs=offsets_E)
        ctx.save_for_backward(rows_RD, weights_R, gate_up_ED2F, down_EFD, offsets_E, gate_up_R2F)
        gate, up = gate_up_R2F.chunk(2, dim=-1)
        hidden_RF = F.silu(gate).mul_(up).mul_(weights_R[:, None].to(rows_RD.dtype))
        return F.grouped_mm(hidden_RF, down_EFD, offs=offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weights_R, gate_up_ED2F, down_EFD, offsets_E, gate_up_R2F = ctx.saved_tensors
        gradient_RD = gradient_RD.contiguous()  # grouped matmul takes no expanded one
        weights_R1 = weights_R[:, None].to(rows_RD.dtype)
        gate, up = gate_up_R2F.chunk(2, dim=-1)
        back_RF = F.grouped_mm(gradient_RD, down_EFD.mT, offs=offsets_E)
        silu_RF = F.silu(gate)
        inner_R2F = torch.empty_like(gate_up_R2F)
        gate_back, up_back = inner_R2F.chunk(2, dim=-1)
        torch.mul(silu_RF, back_RF, out=up_back)
        # A bf16 sum over the width would lose digits.
        exact = torch.promote_types(torch.float32, rows_RD.dtype)
        weight_gradient_R = (up_back * up).sum(-1, dtype=exact).to(weights_R.dtype)
        torch.ops.aten.silu_backward.grad_input(back_RF.mul_(up), gate, grad_input=gate_back)
        inner_R2F *= weights_R1
        hidden_RF = silu_RF.mul_(up).mul_(weights_R1)
        return (
            F.grouped_mm(inner_R2F, gate_up_ED2F.mT, offs=offsets_E),
            weight_gradient_R,
            F.grouped_mm(rows_RD.T, inner_R2F, offs=offsets_E),
            F.grouped_mm(hidden_RF.T, gradient_RD, offs=offsets_E),
            None,
        )


class _Take(Function):
    """Put numbers in another order; `place` is the inverse of `order`."""

    @staticmethod
    def forward(ctx: Any, values_M: Tensor, order_M: Tensor, place_UK: Tensor) -> Tensor:
        ctx.save_for_backward(place_UK)
        return values_M.index_select(0, order_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor, None, None]:
        (place_UK,) = ctx.saved_tensors
        return gradient_M.index_select(0, place_UK.flatten()), None, None


class _ToExpertOrder(Function):
    """Backward is a gather too: index_add's order of summation is not fixed on GPUs."""

    @staticmethod
    def forward(ctx: Any, units_UND: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return units_UND.index_select(0, assignment.units)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MND: Tensor) -> tuple[Tensor, None]:
        return _sum_choices(gradient_MND, ctx.assignment), None


class _FromExpertOrder(Function):
    @staticmethod
    def forward(ctx: Any, answers_MND: Tensor, assignment: Assignment) -> Tensor:
        ctx.assignment = assignment
        return _sum_choices(answers_MND, assignment)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_UND: Tensor) -> tuple[Tensor, None]:
        return gradient_UND.index_select(0, ctx.assignment.units), None


def _sum_choices(values_MND: Tensor, assignment: Assignment) -> Tensor:
    place_KU = assignment.places.T
    summed_UND = values_MND.index_select(0, place_KU[0])
    for place_U in place_KU[1:]:
        summed_UND += values_MND.index_select(0, place_U)
    return summed_UND
