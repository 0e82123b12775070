"""Time Tracker's router: affinity to learned cluster centres, one decision per variate and window.

Shapes: B windows, C variates, N patches, D model width, E routed experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.moe.routers.choice import choose_experts, weigh_chosen
from tsmoe.moe.routers.load_bias import LoadBias
from tsmoe.moe.routing import Decision, RouterState, Routing
from tsmoe.nn.spans import SeriesSpans, mean_within


@dataclass(frozen=True, kw_only=True)
class SequenceRouterConfig(Section):
    """Routing by affinity to token clusters, balanced by a bias that only selects.

    Time Tracker (arXiv 2505.15151), Algorithm 1.
    """

    type: Literal["sequence"] = "sequence"
    mode: Literal["sequence", "prefix", "token"] = "prefix"
    """`sequence`: the mean affinity of all tokens decides for all (the paper's). `prefix`: the mean
    up to each token decides for it, so that no decision knows the future. `token`: each its own."""
    top_k: int = 2
    """Experts chosen per decision."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k ({self.top_k}) must be at least 1")


class SequenceRouter(nn.Module):
    """Choose the `top_k` experts whose cluster centres are nearest, plus a load bias.

    The bias decides who is chosen and never how much they contribute.

    Source: Time Tracker (arXiv 2505.15151), Algorithm 1; balance as in loss-free balancing (arXiv
    2408.15664). Ours: sigmoid affinity, weights renormalised over the
    chosen, or the affinity itself where one is chosen.
    """

    def __init__(self, config: SequenceRouterConfig, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.mode = config.mode
        self.top_k = config.top_k
        self.clusters_ED = nn.Parameter(torch.empty(num_experts, d_model))
        # Tokens are RMS-normalised, so this gives logits of unit variance.
        nn.init.normal_(self.clusters_ED, std=d_model**-0.5)
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
        # bf16 affinities of neighbouring experts would tie; the product is small, so fp32 is cheap.
        with torch.autocast(tokens_BCND.device.type, enabled=False):
            logits_BCNE = tokens_BCND.float() @ self.clusters_ED.float().T
            scores_BCNE = self._pool(logits_BCNE.sigmoid(), spans)
        patches = logits_BCNE.shape[2]
        if decision is None:
            decision = self._decide(scores_BCNE.detach(), spans)
        expert_ids_BCNK = decision.expert_ids_BCNK[:, :, : scores_BCNE.shape[2]]
        weights_BCNK = weigh_chosen(scores_BCNE, expert_ids_BCNK)
        routing = Routing(
            expert_ids_BCNK=expert_ids_BCNK.expand(-1, -1, patches, -1),
            weights_BCNK=weights_BCNK.expand(-1, -1, patches, -1),
            scores_BCNE=scores_BCNE,
            load_E=decision.load_E,
            margin=decision.margin,
            is_per_sequence=self.mode == "sequence" and spans is None,
            is_token_BCN=None if spans is None else spans.is_token_BCN,
        )
        return routing, state

    def _decide(self, scores_BCNE: Tensor, spans: SeriesSpans | None) -> Decision:
        """Choose experts and count what was chosen."""
        is_counted_BCN = None
        if spans is not None:  # in sequence mode one decision for each series
            is_counted_BCN = spans.is_last() if self.mode == "sequence" else spans.is_token_BCN
        return choose_experts(
            scores_BCNE,
            self.balance.bias_E,
            top_k=self.top_k,
            is_counted_BCN=is_counted_BCN,
        )

    def _pool(self, scores_BCNE: Tensor, spans: SeriesSpans | None) -> Tensor:
        """Average over the tokens that a decision is made for; N becomes 1 for a whole window."""
        match self.mode, spans:
            case "sequence", None:
                return scores_BCNE.mean(2, keepdim=True)
            case "sequence", SeriesSpans():
                return mean_within(scores_BCNE, spans.is_same())
            case "prefix", None:
                patches = scores_BCNE.shape[2]
                counts_N1 = torch.arange(1, patches + 1, device=scores_BCNE.device)[:, None]
                return scores_BCNE.cumsum(2) / counts_N1
            case "prefix", SeriesSpans():
                return mean_within(scores_BCNE, spans.is_past())
        return scores_BCNE
