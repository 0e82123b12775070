"""What routers share that score experts by a softmax: tracks, noise, choice.

Shapes: B windows, C variates, N patches, D model width, R width of what is scored, E routed
experts, V tracks: with the gradient of the tokens, and while training one that is cut off from it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.moe.routers.choice import choose_experts, weigh_chosen
from tsmoe.moe.routing import Decision, Routing
from tsmoe.nn.spans import SeriesSpans


def check_router(top_k: int, noise: float) -> None:
    """Refuse settings that no router can have."""
    if top_k < 1 or not 0 <= noise < float("inf"):
        raise ValueError(f"top_k ({top_k}) must be at least 1, noise ({noise}) at least 0")


class Float32Linear(nn.Linear):
    """A linear map in float32, whatever the precision of its weights.

    In bf16 the scores of neighbouring experts would tie. A module of its own, as DeepSpeed's stage
    3 gathers weights, forward and backward, where a module takes and returns tensors.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (.., D) to (.., E)."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(inputs, self.weight.float(), bias)


def tracks_of(tokens_BCND: Tensor, *, is_training: bool) -> Tensor:
    """Return the tokens, and while training the tokens again, cut off from what made them.

    What is computed of the second track has a gradient to the router's weights only.
    """
    tokens_BCND = tokens_BCND.float()
    if is_training and torch.is_grad_enabled():
        return torch.stack((tokens_BCND, tokens_BCND.detach()))
    return tokens_BCND.unsqueeze(0)


def noisy_scores(
    hidden_VBCNR: Tensor, gate: nn.Module, spread: nn.Module | None, noise: float
) -> Tensor:
    """Return softmax scores, with learned noise while training; equal on both tracks.

    Source: PatchMoE (arXiv 2509.22279), Eq. (7), as reconstructed: `mu + eps * softplus(W h)`.
    """
    logits_VBCNE = gate(hidden_VBCNR)
    if spread is not None and spread.training:
        spread_VBCNE = F.softplus(spread(hidden_VBCNR))
        logits_VBCNE = logits_VBCNE + noise * torch.randn_like(spread_VBCNE[0]) * spread_VBCNE
    return logits_VBCNE.softmax(-1)


def softmax_routing(
    scores_VBCNE: Tensor,
    bias_E: Tensor,
    *,
    top_k: int,
    spans: SeriesSpans | None,
    decision: Decision | None,
) -> Routing:
    """Choose by the first track, unless it was decided, and put the routing together."""
    scores_BCNE = scores_VBCNE[0]
    if decision is None:
        decision = choose_experts(
            scores_BCNE.detach(),
            bias_E,
            top_k=top_k,
            is_counted_BCN=None if spans is None else spans.is_token_BCN,
        )
    return Routing(
        expert_ids_BCNK=decision.expert_ids_BCNK,
        weights_BCNK=weigh_chosen(scores_BCNE, decision.expert_ids_BCNK),
        scores_BCNE=scores_BCNE,
        load_E=decision.load_E,
        margin=decision.margin,
        is_per_sequence=False,
        is_token_BCN=None if spans is None else spans.is_token_BCN,
        router_scores_BCNE=scores_VBCNE[1] if len(scores_VBCNE) > 1 else None,
    )
