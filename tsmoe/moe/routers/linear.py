"""The plain router: a linear map of each token, softmax, top k.

The twin that routers with a memory are compared with.

Shapes: B windows, C variates, N patches, D model width, E routed experts, V tracks.
"""

from __future__ import annotations

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
class LinearRouterConfig(Section):
    """Each layer routes by itself; with noise it is the gate of DUET (arXiv 2412.10859)."""

    type: Literal["linear"] = "linear"
    top_k: int = 2
    """Experts chosen per token."""
    noise: float = 0.0
    """Multiplies the learned noise on the scores while training; 0: none is learned."""

    def __post_init__(self) -> None:
        check_router(self.top_k, self.noise)


class LinearRouter(nn.Module):
    """Softmax over a linear map of the token.

    Source: sparsely gated experts (arXiv 1701.06538). Ours: chosen weights are scaled to a sum of
    1; a load bias that may rest.
    """

    def __init__(self, config: LinearRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.noise = config.noise
        self.gate = Float32Linear(d_model, num_experts, bias=False)
        self.spread = Float32Linear(d_model, num_experts, bias=False) if config.noise else None
        self.balance = LoadBias(num_experts)

    def forward(
        self,
        tokens_BCND: Tensor,
        state: RouterState | None,
        *,
        spans: SeriesSpans | None = None,
        decision: Decision | None = None,
    ) -> tuple[Routing, RouterState | None]:
        """Route; the state passes through untouched, as this router keeps none."""
        with torch.autocast(tokens_BCND.device.type, enabled=False):
            tokens_VBCND = tracks_of(tokens_BCND, is_training=self.training)
            scores_VBCNE = noisy_scores(tokens_VBCND, self.gate, self.spread, self.noise)
        routing = softmax_routing(
            scores_VBCNE,
            self.balance.bias_E,
            top_k=self.top_k,
            spans=spans,
            decision=decision,
        )
        return routing, state
