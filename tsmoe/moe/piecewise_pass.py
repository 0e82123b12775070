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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsmoe.moe.assignment import Assignment

# Rows of a piece at most. Larger ones gain nothing in matmul and fall out of the cache.
_PIECE_ROWS = 2048
# oneDNN compiles a kernel for each new shape: 0.4-0.9 ms, as long as a bf16 product of 800 x 256 x
# 1024 takes. Counts differ from step to step; filled up to such multiples they soon repeat.
_SMALLEST_MULTIPLE = 16
_MULTIPLES_IN_A_PIECE = 32


def run_piecewise(
    units_UND: Tensor,
    weights_UK: Tensor,
    gate_up_ED2F: Tensor,
    down_EFD: Tensor,
    assignment: Assignment,
) -> Tensor:
    """Return each unit's weighted sum of its experts' answers."""
    # Inside a Function's forward pass torch says that gradients are off, always.
    keeps = torch.is_grad_enabled()
    return _Experts.apply(units_UND, weights_UK, gate_up_ED2F, down_EFD, assignment, keeps)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some choices of one expert."""

    expert: int
    choices: int
    rows: int
    padded: int
    """Rows with those that fill up."""
    is_first: bool
    """Of its expert."""

    def by_choice(self, rows: Tensor) -> Tensor:
        """Show rows as one line for each choice, without those that fill up."""
        return rows[: self.rows].view(self.choices, -1)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Write the product into a gradient, or add it where the expert has had a piece before."""
        if self.is_first:
            torch.mm(left, right, out=total)
        else:
            total.addmm_(left, right)


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
        if filled < padded:
            self._rows[filled:padded] = 0
        return self._rows[:padded]

    def take(self, padded: int) -> Tensor:
        """Return uninitialised rows."""
        return self._rows[:padded]


class _Sizes:
    """How the choices are cut into pieces."""

    def __init__(self, units_UND: Tensor, down_EFD: Tensor, assignment: Assignment) -> None:
        self.tokens_per_unit = units_UND.shape[1]
        _, self.d_ff, self.d_model = down_EFD.shape
        self._fills_up = pays_for_new_shapes(units_UND.dtype)
        self._pieces = list(self._cut(assignment.counts))
        self.most = max((piece.padded for piece in self._pieces), default=0)

    def each(
        self, assignment: Assignment, weights_UK: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[_Piece, Tensor, Tensor]]:
        """Yield each piece with the units and weights of its choices."""
        weights_M1 = weights_UK.flatten().index_select(0, assignment.order_M)[:, None].to(dtype)
        lengths = [piece.choices for piece in self._pieces]
        yield from zip(
            self._pieces, assignment.units.split(lengths), weights_M1.split(lengths), strict=True
        )

    def _cut(self, counts: list[int]) -> Iterator[_Piece]:
        """Cut each expert's choices into pieces of about equal size."""
        for expert, count in enumerate(counts):
            number = min(count, -(-count * self.tokens_per_unit // _PIECE_ROWS))
            for index in range(number):
                choices = count * (index + 1) // number - count * index // number
                rows = choices * self.tokens_per_unit
                padded = _fill_up(rows) if self._fills_up else rows
                yield _Piece(expert, choices, rows, padded, index == 0)


def _fill_up(rows: int) -> int:
    """Return the next of few sizes: some tens up to a whole piece, 2 % larger on average."""
    multiple = max(_SMALLEST_MULTIPLE, (1 << rows.bit_length()) // _MULTIPLES_IN_A_PIECE)
    return -(-rows // multiple) * multiple


def pays_for_new_shapes(dtype: torch.dtype) -> bool:
    """Say whether oneDNN multiplies: float32 is MKL's unless the precision setting says else."""
    if dtype == torch.float32:
        setting: Any = torch.backends.mkldnn
        return setting.matmul.fp32_precision == "bf16"
    return dtype == torch.bfloat16


class _Experts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        units_UND: Tensor,
        weights_UK: Tensor,
        gate_up_ED2F: Tensor,
        down_EFD: Tensor,
        assignment: Assignment,
        keeps: bool,
    ) -> Tensor:
        sizes = _Sizes(units_UND, down_EFD, assignment)
        units_UX = units_UND.flatten(1)
        summed_UX = torch.zeros_like(units_UX)
        inputs, answers = (_Rows(units_UND, sizes.most, sizes.d_model) for _ in range(2))
        hidden = _Rows(units_UND, sizes.most, sizes.d_ff)
        gate_up, down = gate_up_ED2F.unbind(), down_EFD.unbind()
        kept = []
        for piece, units_m, weights_m1 in sizes.each(assignment, weights_UK, units_UND.dtype):
            input_PD = inputs.gather(units_UX, units_m, piece.padded)
            gate_up_P2F = torch.mm(input_PD, gate_up[piece.expert])
            gate, up = gate_up_P2F.chunk(2, dim=1)
            hidden_PF = torch.ops.aten.silu.out(gate, out=hidden.take(piece.padded)).mul_(up)
            answer_PD = torch.mm(hidden_PF, down[piece.expert], out=answers.take(piece.padded))
            answer_mX = piece.by_choice(answer_PD).mul_(weights_m1)
            summed_UX.index_add_(0, units_m, answer_mX)
            if keeps:
                kept.append(gate_up_P2F)
        ctx.save_for_backward(units_UND, weights_UK, gate_up_ED2F, down_EFD, *kept)
        ctx.assignment, ctx.sizes = assignment, sizes
        return summed_UX.view_as(units_UND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_UND: Tensor) -> tuple[Tensor | None, ...]:
        units_UND, weights_UK, gate_up_ED2F, down_EFD, *kept = ctx.saved_tensors
        assignment: Assignment = ctx.assignment
        # As in the forward pass: a precision set since would change what is kept.
        sizes: _Sizes = ctx.sizes
        units_UX, gradient_UX = units_UND.flatten(1), gradient_UND.flatten(1)
        units_back_UX = torch.zeros_like(units_UX)
        gate_up_back_ED2F, down_back_EFD = map(torch.empty_like, (gate_up_ED2F, down_EFD))
        for expert, count in enumerate(assignment.counts):
            if count == 0:
                gate_up_back_ED2F[expert] = 0
                down_back_EFD[expert] = 0
        gate_up_back, down_back = gate_up_back_ED2F.unbind(), down_back_EFD.unbind()
        gate_up_T, down_T = gate_up_ED2F.mT.unbind(), down_EFD.mT.unbind()
        inputs, backs = (_Rows(units_UND, sizes.most, sizes.d_model) for _ in range(2))
        silu, hidden, hidden_back = (_Rows(units_UND, sizes.most, sizes.d_ff) for _ in range(3))
        inner = _Rows(units_UND, sizes.most, 2 * sizes.d_ff)
        # A bf16 sum over the width would lose digits.
        exact = torch.promote_types(torch.float32, units_UND.dtype)
        contributions = [units_UND.new_empty(0, dtype=exact)]
        pieces = sizes.each(assignment, weights_UK, units_UND.dtype)
        for (piece, units_m, weights_m1), gate_up_P2F in zip(pieces, kept, strict=True):
            padded, expert = piece.padded, piece.expert
            gate, up = gate_up_P2F.chunk(2, dim=1)
            inner_P2F = inner.take(padded)
            gate_back, up_back = inner_P2F.chunk(2, dim=1)
            back_PD = backs.gather(gradient_UX, units_m, padded)
            hidden_back_PF = torch.mm(back_PD, down_T[expert], out=hidden_back.take(padded))
            silu_PF = torch.ops.aten.silu.out(gate, out=silu.take(padded))
            hidden_PF = torch.mul(silu_PF, up, out=hidden.take(padded))
            product_PF = torch.mul(hidden_PF, hidden_back_PF, out=up_back)  # only to be summed
            contributions.append(product_PF.sum(1, dtype=exact)[: piece.rows])
            piece.by_choice(hidden_back_PF).mul_(weights_m1)
            torch.mul(silu_PF, hidden_back_PF, out=up_back)
            hidden_back_PF.mul_(up)
            torch.ops.aten.silu_backward.grad_input(hidden_back_PF, gate, grad_input=gate_back)
            piece.by_choice(back_PD).mul_(weights_m1)
            piece.add_product(down_back[expert], hidden_PF.T, back_PD)
            input_PD = inputs.gather(units_UX, units_m, padded)
            piece.add_product(gate_up_back[expert], input_PD.T, inner_P2F)
            input_back_PD = torch.mm(inner_P2F, gate_up_T[expert], out=back_PD)
            units_back_UX.index_add_(0, units_m, piece.by_choice(input_back_PD))
        contribution_M = torch.cat(contributions).unflatten(0, (-1, sizes.tokens_per_unit)).sum(1)
        weights_back_M = torch.empty_like(contribution_M)
        weights_back_M[assignment.order_M] = contribution_M
        return (
            units_back_UX.view_as(units_UND),
            weights_back_M.view_as(weights_UK).to(weights_UK.dtype),
            gate_up_back_ED2F,
            down_back_EFD,
            None,
            None,
        )
