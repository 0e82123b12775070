"""PatchMoE's router: what a token was to earlier layers decides with what it is to this one.

Shapes: B windows, C variates, N patches, D model width, R width of the memory, E routed experts,
V tracks, X = V*B*C*N rows of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.moe.routers.load_bias import LoadBias
from tsmoe.moe.routers.softmax_scores import (
    Float32Linear,
    check_router,
    noisy_scores,
    softmax_routing,
    tracks_of,
)
from tsmoe.moe.routing import Decision, RouterState, Routing
from tsmoe.nn.spans import SeriesSpans


@dataclass(frozen=True, kw_only=True)
class RecurrentRouterConfig(Section):
    """Recurrent noisy gating (PatchMoE, arXiv 2509.22279).

    Without noise and with a GRU for all layers it is the router of RMoE (arXiv 2408.06793).
    """

    type: Literal["recurrent"] = "recurrent"
    top_k: int = 2
    """Experts chosen per token."""
    d_router: int = 128
    """Width of the memory. Ours: tokens are projected to it, as in RMoE."""
    noise: float = 1.0
    """Multiplies the learned noise on the scores while training; 0: none is learned."""
    shares_memory: bool = True
    """One GRU for all layers (the paper's), or a GRU for each."""

    def __post_init__(self) -> None:
        check_router(self.top_k, self.noise)
        if self.d_router < 1:
            raise ValueError(f"d_router ({self.d_router}) must be at least 1")


class RecurrentRouter(nn.Module):
    """A GRU over layers, for each token by itself; scores are a noisy linear map of its state.

    Source: PatchMoE (arXiv 2509.22279), Eqs. (4) and (7). Ours, where it is silent: the state is
    zero before the first layer, tokens are projected to `d_router`, each layer has its own maps
    from the state to scores and noise, chosen weights are scaled to a sum of 1.
    """

    def __init__(self, config: RecurrentRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.noise = config.noise
        self.shares_memory = config.shares_memory
        self.project = Float32Linear(d_model, config.d_router)
        self.memory: nn.Module | None = _Memory(config.d_router, config.d_router)
        self.gate = Float32Linear(config.d_router, num_experts, bias=False)
        self.spread = (
            Float32Linear(config.d_router, num_experts, bias=False) if config.noise else None
        )
        self.balance = LoadBias(num_experts)
        # In a tuple, so that the owner's weights are not also counted as ours.
        self._first: tuple[RecurrentRouter, ...] = ()

    def share_memory_of(self, first: RecurrentRouter) -> None:
        """Use the GRU of the first layer's router, which owns it, from now on."""
        self.memory, self._first = None, (first,)

    def forward(
        self,
        tokens_BCND: Tensor,
        state: RouterState | None,
        *,
        spans: SeriesSpans | None = None,
        decision: Decision | None = None,
    ) -> tuple[Routing, RouterState | None]:
        """Route, and return the memory for the next layer."""
        state = RouterState() if state is None else state
        memory = self._first[0].memory if self._first else self.memory
        assert memory is not None
        with torch.autocast(tokens_BCND.device.type, enabled=False):
            tokens_VBCND = tracks_of(tokens_BCND, is_training=self.training)
            inputs_VBCNR = self.project(tokens_VBCND)
            if state.task_B11R is not None:
                inputs_VBCNR = inputs_VBCNR + state.task_B11R
            hidden_XR = memory(inputs_VBCNR.flatten(0, -2), state.hidden_XR)
            hidden_VBCNR = hidden_XR.view_as(inputs_VBCNR)
            scores_VBCNE = noisy_scores(hidden_VBCNR, self.gate, self.spread, self.noise)
        routing = softmax_routing(
            scores_VBCNE,
            self.balance.bias_E,
            top_k=self.top_k,
            spans=spans,
            decision=decision,
        )
        return routing, RouterState(hidden_XR=hidden_XR, task_B11R=state.task_B11R)


class _Memory(nn.GRUCell):
    """The GRU cell in float32, whatever the precision of its weights."""

    def forward(self, inputs_XR: Tensor, hidden_XR: Tensor | None = None) -> Tensor:
        if hidden_XR is None:
            hidden_XR = torch.zeros_like(inputs_XR)
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return torch.gru_cell(inputs_XR, hidden_XR, *(weight.float() for weight in weights))


def share_memory(routers: Sequence[nn.Module]) -> None:
    """Let recurrent routers of one model that are to share a memory share the first one's."""
    recurrent = [r for r in routers if isinstance(r, RecurrentRouter) and r.shares_memory]
    for router in recurrent[1:]:
        router.share_memory_of(recurrent[0])
