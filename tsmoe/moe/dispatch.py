"""Bring units to the experts that were chosen for them, wherever these live, and back.

Dropless: every token reaches every expert it was sent to. A *unit* is what moves as a whole: a
token, or all tokens of a variate where the router decides per sequence. Of packed windows only
the tokens of a series move.

Shapes: B windows, C variates, U units, M = U*K units sent, N tokens per unit, D model width, K
experts per token; V units that came from all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsmoe.moe.exchange import Exchange
from tsmoe.moe.experts import Experts
from tsmoe.moe.grouped_pass import gather_units, sum_units, take_weights
from tsmoe.moe.plan import Arrivals, DispatchPlan
from tsmoe.moe.routing import Routing
from tsmoe.ranks import ExchangeLabel


def run_experts(
    tokens_BCND: Tensor,
    routing: Routing,
    experts: Experts,
    plan: DispatchPlan,
    *,
    alongside: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs for each token.

    Every rank that shares the experts must call it equally often, with any number of tokens. It
    communicates rows and their weights to the experts and rows back, and the same in the backward
    pass.

    Args:
        tokens_BCND: normalised tokens.
        routing: its weights are used; the choice is that of the plan.
        experts: all of them, or this rank's share.
        plan: see `plan_dispatch`.
        alongside: computed while rows travel; its result is added.
    """
    if routing.is_per_sequence:
        units_UND = tokens_BCND.flatten(0, 1)
        weights_UK = routing.weights_BCNK[:, :, 0].flatten(0, 1)
    else:
        units_UND = tokens_BCND.flatten(0, 2).unsqueeze(1)
        weights_UK = routing.weights_BCNK.flatten(0, 2)
    if plan.place_U is not None:
        units_UND = _Take.apply(units_UND, plan.place_U)
        weights_UK = _Take.apply(weights_UK, plan.place_U)
    added: Tensor | None = None
    if plan.arrivals is None:
        answers_UND = experts(units_UND, weights_UK, plan.assignment)
        added = alongside() if alongside is not None else None
    else:
        there = _Journey(units_UND, weights_UK, experts, plan, plan.arrivals)
        added = alongside() if alongside is not None else None
        answers_UND = there.answers()
    if plan.place_U is not None:
        zeros_UND = answers_UND.new_zeros(tokens_BCND.shape[:3].numel(), 1, tokens_BCND.shape[3])
        answers_UND = zeros_UND.index_copy(0, plan.place_U, answers_UND)
    answers_BCND = answers_UND.reshape(tokens_BCND.shape)
    return answers_BCND if added is None else answers_BCND + added


class _Journey:
    """Units on their way to the experts of other ranks and back."""

    def __init__(
        self,
        units_UND: Tensor,
        weights_UK: Tensor,
        experts: Experts,
        plan: DispatchPlan,
        arrivals: Arrivals,
    ) -> None:
        self._experts, self._plan, self._arrivals = experts, plan, arrivals
        self._rows, self._weights = (self._exchange(is_way_back=False) for _ in range(2))
        self._rows_ticket = self._rows.start(gather_units(units_UND, plan.assignment))
        self._weights_ticket = self._weights.start(take_weights(weights_UK, plan.assignment))

    def answers(self) -> Tensor:
        """Let the experts answer what came, send it back, and sum what comes back."""
        units_VND = self._rows.finish(self._rows_ticket)
        weights_V1 = self._weights.finish(self._weights_ticket).unsqueeze(1)
        answers_VND = self._experts(units_VND, weights_V1, self._arrivals.assignment)
        back = self._exchange(is_way_back=True)
        return sum_units(back.finish(back.start(answers_VND)), self._plan.assignment)

    def _exchange(self, *, is_way_back: bool) -> Exchange:
        layer = self._experts.layer_index
        if is_way_back:
            return Exchange(
                self._experts.ranks,
                send=self._arrivals.receive,
                receive=self._arrivals.send,
                label=ExchangeLabel(layer, "from_experts"),
                back_label=ExchangeLabel(layer, "gradient_to_experts"),
            )
        return Exchange(
            self._experts.ranks,
            send=self._arrivals.send,
            receive=self._arrivals.receive,
            label=ExchangeLabel(layer, "to_experts"),
            back_label=ExchangeLabel(layer, "gradient_from_experts"),
        )


class _Take(Function):
    """Copy some rows, each once; unlike autograd's own, backward copies too and does not add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place_U: Tensor) -> Tensor:
        ctx.save_for_backward(place_U)
        ctx.count = len(rows)
        return rows.index_select(0, place_U)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place_U,) = ctx.saved_tensors
        everywhere = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return everywhere.index_copy_(0, place_U, gradient), None
