"""What a dispatch needs to know before anything moves: who sends how much to whom, in which order.

It holds no activation, so that a pass that is computed again can use the plan of the first.

Shapes: B windows, C variates, N patches, U units, K experts per unit, E routed experts, S ranks,
e experts on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsmoe.moe.assignment import Assignment, count_choices
from tsmoe.moe.routing import Routing
from tsmoe.ranks import ExchangeLabel, Ranks


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """Units that move between ranks."""

    send: list[int]
    """Units for each rank, of those in order of expert."""
    receive: list[int]
    """Units from each rank."""
    assignment: Assignment
    """Of the units that come."""


@dataclass(frozen=True, kw_only=True)
class DispatchPlan:
    """Which units go to which expert, wherever it lives."""

    place_U: Tensor | None
    """int64; of packed windows the tokens of a series. None: all tokens are dispatched."""
    assignment: Assignment
    """Of this rank's units to the experts of all ranks."""
    arrivals: Arrivals | None
    """None where one rank has all experts."""


def plan_dispatch(routing: Routing, ranks: Ranks, *, layer_index: int) -> DispatchPlan:
    """Sort units by expert and tell the other ranks how many they will get.

    Every rank that shares the experts must call it equally often. It communicates counts, once. On
    CUDA the host waits for the counts if there are other ranks, and for the number of tokens of
    packed windows; otherwise it waits for nothing.
    """
    place_U: Tensor | None = None
    counts_E = routing.load_E
    if routing.is_per_sequence:
        expert_ids_UK = routing.expert_ids_BCNK[:, :, 0].flatten(0, 1)
    else:
        expert_ids_UK = routing.expert_ids_BCNK.flatten(0, 2)
    if routing.is_token_BCN is not None:
        place_U = routing.is_token_BCN.flatten().nonzero()[:, 0]
        expert_ids_UK = expert_ids_UK[place_U]
        # The load may count series, which are no unit here.
        counts_E = count_choices(expert_ids_UK, len(routing.load_E))
    if ranks.size == 1:
        assignment = Assignment.of(expert_ids_UK, counts_E)
        return DispatchPlan(place_U=place_U, assignment=assignment, arrivals=None)
    received_E = ranks.exchange_counts(counts_E, ExchangeLabel(layer_index, "to_experts"))
    both = _HostCopy(torch.stack((counts_E, received_E)))
    assignment = Assignment.of(expert_ids_UK, counts_E)  # sorts while the counts travel
    by_rank_2S = both.wait().unflatten(1, (ranks.size, -1)).sum(-1)
    send, receive = by_rank_2S.tolist()
    arrivals = Arrivals(
        send=send,
        receive=receive,
        assignment=Assignment.of_blocks(received_E.unflatten(0, (ranks.size, -1)), sum(receive)),
    )
    return DispatchPlan(place_U=place_U, assignment=assignment, arrivals=arrivals)


class _HostCopy:
    """A copy to the host that is under way; the host waits for it alone, not for later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._copy
