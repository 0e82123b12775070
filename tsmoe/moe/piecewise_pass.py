"""Experts one after another, a piece of the rows at a time: the hot path on CPU.

A piece stays in cache from the gathering of its rows to the summing of its answers, every
intermediate but one is written into the same scratch memory, and the gradients of all experts go
straight into one stacked tensor. Only `gate_up` of each piece is kept for the backward pass.

Shapes: U units, K experts per unit, M = U*K choices, N tokens per unit, D model width, F
feed-forward width, E experts of this rank; X = N*D; P rows of a piece, filled up with zeros; m
choices of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsmoe.moe.assignment import Assignment

# Rows of a piece at most. Larger ones gain nothing in matmul and fall out of the cache.
_PIECE_ROWS = 1024
# oneDNN's bf16 matmul compiles a kernel for each new shape: 0.4-0.9 ms, as long as the product of
# 800 x 256 x 1024 itself takes. Counts differ from step to step, multiples of 32 soon repeat.
_BF16_MULTIPLE = 32


def run_piecewise(
    units_UND: Tensor,
    weights_UK: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    assignment: Assignment,
) -> Tensor:
    """Return each unit's weighted sum of its experts' answers."""
    return _Experts.apply(units_UND, weights_UK, gate_up_ED2F, down_EFD, assignment)


class _Piece(NamedTuple):
    expert: int
    start: int
    stop: int
    is_first: bool
    """Of its expert."""


def _pieces(counts: list[int], tokens_per_unit: int) -> Iterator[_Piece]:
    """Cut each expert's choices into pieces of about equal size."""
    start = 0
    for expert, count in enumerate(counts):
        number = -(-count * tokens_per_unit // _PIECE_ROWS)
        for index in range(number):
            first, last = (start + count * i // number for i in (index, index + 1))
            if first < last:
                yield _Piece(expert, first, last, first == start)
        start += count


class _Rows:
    """Scratch rows of one width, reused by piece after piece; those beyond a piece are zero."""

    def __init__(self, like: Tensor, count: int, width: int) -> None:
        self._rows = like.new_empty(count, width)

    def gather(self, source_UX: Tensor, index_m: Tensor, padded: int) -> Tensor:
        """Copy units of the source here and return them as rows."""
        width = self._rows.shape[1]
        filled = len(index_m) * source_UX.shape[1] // width
        target_mX = self._rows[:filled].view(len(index_m), -1)
        torch.index_select(source_UX, 0, index_m, out=target_mX)
        self._rows[filled:padded] = 0
        return self._rows[:padded]

    def take(self, padded: int) -> Tensor:
        """Return uninitialised rows."""
        return self._rows[:padded]


class _Sizes:
    """Sizes that the passes share."""

    def __init__(self, units_UND: Tensor, down_EFD: Tensor, assignment: Assignment) -> None:
        self.tokens_per_unit = units_UND.shape[1]
        _, self.d_ff, self.d_model = down_EFD.shape
        self._multiple = _BF16_MULTIPLE if units_UND.dtype == torch.bfloat16 else 1
        self.pieces = list(_pieces(assignment.counts, self.tokens_per_unit))
        self.most = max((self.padded(piece) for piece in self.pieces), default=0)

    def padded(self, piece: _Piece) -> int:
        """Rows of a piece with those that fill it up."""
        rows = (piece.stop - piece.start) * self.tokens_per_unit
        return -(-rows // self._multiple) * self._multiple

    def by_choice(self, rows: Tensor, piece: _Piece) -> Tensor:
        """Show rows as one line for each choice, without those that fill up."""
        choices = piece.stop - piece.start
        return rows[: choices * self.tokens_per_unit].unflatten(0, (choices, -1))


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        units_UND: Tensor,
        weights_UK: Tensor,
        gate_up_ED2F: Tensor,
        down_EFD: Tensor,
        assignment: Assignment,
    ) -> Tensor:
        sizes = _Sizes(units_UND, down_EFD, assignment)
        units_UX = units_UND.flatten(1)
        weights_M11 = weights_UK.flatten()[assignment.order_M, None, None].to(units_UND.dtype)
        summed_UX = torch.zeros_like(units_UX)
        inputs, answers = (_Rows(units_UND, sizes.most, sizes.d_model) for _ in range(2))
        hidden = _Rows(units_UND, sizes.most, sizes.d_ff)
        kept = []
        for piece in sizes.pieces:
            padded = sizes.padded(piece)
            index_m = assignment.units[piece.start : piece.stop]
            input_PD = inputs.gather(units_UX, index_m, padded)
            gate_up_P2F = torch.mm(input_PD, gate_up_ED2F[piece.expert])
            gate, up = gate_up_P2F.chunk(2, dim=-1)
            hidden_PF = torch.ops.aten.silu.out(gate, out=hidden.take(padded)).mul_(up)
            sizes.by_choice(hidden_PF, piece).mul_(weights_M11[piece.start : piece.stop])
            answer_PD = torch.mm(hidden_PF, down_EFD[piece.expert], out=answers.take(padded))
            summed_UX.index_add_(0, index_m, sizes.by_choice(answer_PD, piece).flatten(1))
            kept.append(gate_up_P2F)
        ctx.save_for_backward(units_UND, weights_UK, gate_up_ED2F, down_EFD, *kept)
        ctx.assignment = assignment
        return summed_UX.view_as(units_UND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_UND: Tensor) -> tuple[Tensor | None, ...]:
        units_UND, weights_UK, gate_up_ED2F, down_EFD, *kept = ctx.saved_tensors
        assignment: Assignment = ctx.assignment
        sizes = _Sizes(units_UND, down_EFD, assignment)
        units_UX, gradient_UX = units_UND.flatten(1), gradient_UND.flatten(1)
        weights_M11 = weights_UK.flatten()[assignment.order_M, None, None].to(units_UND.dtype)
        units_back_UX = torch.zeros_like(units_UX)
        gate_up_back_ED2F, down_back_EFD = map(torch.empty_like, (gate_up_ED2F, down_EFD))
        for expert, count in enumerate(assignment.counts):
            if count == 0:
                gate_up_back_ED2F[expert] = 0
                down_back_EFD[expert] = 0
        exact = torch.promote_types(torch.float32, units_UND.dtype)
        contribution_M = weights_M11.new_empty(len(weights_M11), dtype=exact)
        inputs, backs = (_Rows(units_UND, sizes.most, sizes.d_model) for _ in range(2))
        silu, hidden_back = (_Rows(units_UND, sizes.most, sizes.d_ff) for _ in range(2))
        inner = _Rows(units_UND, sizes.most, 2 * sizes.d_ff)
        for piece, gate_up_P2F in zip(sizes.pieces, kept, strict=True):
            padded, chosen = sizes.padded(piece), slice(piece.start, piece.stop)
            index_m, weights_m11 = assignment.units[chosen], weights_M11[chosen]
            gate, up = gate_up_P2F.chunk(2, dim=-1)
            back_PD = backs.gather(gradient_UX, index_m, padded)
            hidden_back_PF = hidden_back.take(padded)
            torch.mm(back_PD, down_EFD[piece.expert].T, out=hidden_back_PF)
            # From here on: silu(gate), then the hidden row; its gradient, then that of the gate.
            silu_PF = torch.ops.aten.silu.out(gate, out=silu.take(padded))
            inner_P2F = inner.take(padded)
            gate_back, up_back = inner_P2F.chunk(2, dim=-1)
            torch.mul(silu_PF, hidden_back_PF, out=up_back)
            torch.mul(up_back, up, out=gate_back)  # only to be summed
            sums = sizes.by_choice(gate_back, piece).sum((1, 2), dtype=exact)
            contribution_M[chosen] = sums
            hidden_back_PF.mul_(up)
            torch.ops.aten.silu_backward.grad_input(hidden_back_PF, gate, grad_input=gate_back)
            sizes.by_choice(inner_P2F, piece).mul_(weights_m11)
            sizes.by_choice(back_PD, piece).mul_(weights_m11)
            hidden_PF = silu_PF.mul_(up)
            _add_product(down_back_EFD[piece.expert], hidden_PF.T, back_PD, piece)
            input_PD = inputs.gather(units_UX, index_m, padded)
            _add_product(gate_up_back_ED2F[piece.expert], input_PD.T, inner_P2F, piece)
            input_back_PD = torch.mm(inner_P2F, gate_up_ED2F[piece.expert].T, out=back_PD)
            units_back_UX.index_add_(0, index_m, sizes.by_choice(input_back_PD, piece).flatten(1))
        weights_back_M = torch.empty_like(contribution_M)
        weights_back_M[assignment.order_M] = contribution_M
        return (
            units_back_UX.view_as(units_UND),
            weights_back_M.view_as(weights_UK).to(weights_UK.dtype),
            gate_up_back_ED2F,
            down_back_EFD,
            None,
        )


def _add_product(total: Tensor, left: Tensor, right: Tensor, piece: _Piece) -> None:
    """Write the product into the gradient, or add it where the expert has had a piece before."""
    if piece.is_first:
        torch.mm(left, right, out=total)
    else:
        total.addmm_(left, right)
