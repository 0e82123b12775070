"""Bring tokens to the experts that were chosen for them, wherever these live, and back.

Dropless: every token reaches every expert it was sent to. A *unit* is what moves as a whole: a
token, or all tokens of a variate where the router decides per sequence. Of packed windows only
the tokens of a series move.

Shapes: U units, M = U*K units sent, N tokens per unit, R = M*N rows, D model width, E routed
experts, K experts per token, e experts on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from tsmoe.moe.experts import Experts
from tsmoe.moe.routing import Routing
from tsmoe.ranks import Ranks


def run_experts(tokens_BCND: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs for each token.

    Every rank that shares the experts must call it equally often, with any number of tokens. It
    communicates counts once and rows twice (and twice again in the backward pass).
    """
    place_U: Tensor | None = None
    if routing.is_per_sequence:
        units_UND = tokens_BCND.flatten(0, 1)
        expert_ids_UK = routing.expert_ids_BCNK[:, :, 0].flatten(0, 1)
        weights_UK = routing.weights_BCNK[:, :, 0].flatten(0, 1)
    else:
        units_UND = tokens_BCND.flatten(0, 2).unsqueeze(1)
        expert_ids_UK = routing.expert_ids_BCNK.flatten(0, 2)
        weights_UK = routing.weights_BCNK.flatten(0, 2)
    if routing.is_token_BCN is not None:
        place_U = routing.is_token_BCN.flatten().nonzero()[:, 0]
        units_UND = _Take.apply(units_UND, place_U)
        expert_ids_UK, weights_UK = expert_ids_UK[place_U], _Take.apply(weights_UK, place_U)
    top_k = expert_ids_UK.shape[1]
    order_M = expert_ids_UK.flatten().argsort(stable=True)
    position_UK = (
        torch.empty_like(order_M)
        .scatter_(0, order_M, torch.arange(len(order_M), device=order_M.device))
        .unflatten(0, (-1, top_k))
    )
    sent_MND = _ToExpertOrder.apply(units_UND, order_M, position_UK)
    tokens_per_unit = units_UND.shape[1]
    rows_RD = sent_MND.flatten(0, 1)
    counts_E = routing.load_E * tokens_per_unit
    if place_U is not None:  # the load may count series, which are no unit here
        counts_E = expert_ids_UK.flatten().bincount(minlength=len(routing.load_E))
    if experts.ranks.size == 1:
        answered_RD = experts(rows_RD, counts_E.tolist())
    else:
        answered_RD = _run_remote(rows_RD, counts_E, experts)
    answered_MND = answered_RD.unflatten(0, (-1, tokens_per_unit))
    combined_UND = _Combine.apply(answered_MND, weights_UK, order_M, position_UK)
    if place_U is not None:
        zeros_UND = combined_UND.new_zeros(tokens_BCND.shape[:3].numel(), 1, tokens_BCND.shape[3])
        combined_UND = zeros_UND.index_copy(0, place_U, combined_UND)
    return combined_UND.reshape(tokens_BCND.shape)


def _run_remote(rows_RD: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
    """Exchange rows with the ranks that hold their experts."""
    ranks, local = experts.ranks, experts.num_local_experts
    received_E = ranks.exchange_counts(counts_E)
    send = counts_E.unflatten(0, (ranks.size, local)).sum(1).tolist()
    received = received_E.unflatten(0, (ranks.size, local)).tolist()
    receive = [sum(counts) for counts in received]
    got_RD = _AllToAll.apply(rows_RD, send, receive, ranks)
    # Rows come ordered by (source rank, expert); experts want (expert, source rank). Whole blocks
    # move, so slices and one concatenation do it without an index per row.
    blocks = got_RD.split([count for counts in received for count in counts])
    by_expert = [source * local + expert for expert in range(local) for source in range(ranks.size)]
    local_RD = torch.cat([blocks[block] for block in by_expert])
    local_counts = [sum(counts[expert] for counts in received) for expert in range(local)]
    done_RD = experts(local_RD, local_counts)
    done = done_RD.split([len(blocks[block]) for block in by_expert])
    by_source = [
        expert * ranks.size + source for source in range(ranks.size) for expert in range(local)
    ]
    return _AllToAll.apply(torch.cat([done[block] for block in by_source]), receive, send, ranks)


class _AllToAll(Function):
    """Exchange rows between ranks; the gradient takes the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, send: list[int], receive: list[int], ranks: Ranks
    ) -> Tensor:
        ctx.route = send, receive, ranks
        return ranks.start_all_to_all(rows_RD, send=send, receive=receive).wait()

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, ranks = ctx.route
        pending = ranks.start_all_to_all(gradient_RD, send=receive, receive=send)
        return pending.wait(), None, None, None


class _Take(Function):
    """Copy some rows, each once; unlike autograd's own, backward copies too and does not add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place_U: Tensor) -> Tensor:
        ctx.save_for_backward(place_U)
        ctx.count = len(rows)
        return rows.index_select(0, place_U)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place_U,) = ctx.saved_tensors
        everywhere = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return everywhere.index_copy_(0, place_U, gradient), None


class _ToExpertOrder(Function):
    """Copy each unit once per chosen expert, in order of expert.

    Backward is a gather too: index_add, which autograd would use, is far slower and its order of
    summation is not fixed on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, units_UND: Tensor, order_M: Tensor, position_UK: Tensor) -> Tensor:
        ctx.save_for_backward(position_UK)
        return units_UND.index_select(0, order_M // position_UK.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient_MND: Tensor) -> tuple[Tensor, None, None]:
        (position_UK,) = ctx.saved_tensors
        gradient_UND = gradient_MND.index_select(0, position_UK[:, 0])
        for choice in range(1, position_UK.shape[1]):
            gradient_UND += gradient_MND.index_select(0, position_UK[:, choice])
        return gradient_UND, None, None


class _Combine(Function):
    """Weighted sum of each unit's answers, brought back to the order of units."""

    @staticmethod
    def forward(
        ctx: Any, answered_MND: Tensor, weights_UK: Tensor, order_M: Tensor, position_UK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(answered_MND, weights_UK, order_M, position_UK)
        weights_UK = weights_UK.to(answered_MND.dtype)
        combined_UND = answered_MND.index_select(0, position_UK[:, 0])
        combined_UND *= weights_UK[:, 0, None, None]
        for choice in range(1, position_UK.shape[1]):
            answer_UND = answered_MND.index_select(0, position_UK[:, choice])
            combined_UND.addcmul_(answer_UND, weights_UK[:, choice, None, None])
        return combined_UND

    @staticmethod
    def backward(ctx: Any, gradient_UND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        answered_MND, weights_UK, order_M, position_UK = ctx.saved_tensors
        top_k = position_UK.shape[1]
        gradient_MND = gradient_UND.index_select(0, order_M // top_k)
        # The contribution's gradient in float32 at least: a bf16 sum over the width loses digits.
        exact = torch.promote_types(torch.float32, answered_MND.dtype)
        score_M = (gradient_MND * answered_MND).sum((1, 2), dtype=exact)
        weight_gradient_UK = score_M[position_UK].to(weights_UK.dtype)
        weights_M = weights_UK.flatten()[order_M].to(gradient_MND.dtype)
        return gradient_MND * weights_M[:, None, None], weight_gradient_UK, None, None
