"""PatchMoE's loss that keeps the tokens of a variate, and those of a time, from the same experts.

Shapes: B windows, C variates, N patches, E routed experts, K experts per token, M expert layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsmoe.config import Section
from tsmoe.moe.routing import Routing
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class BalanceLossConfig(Section):
    """Weights of the temporal & channel load-balancing loss (PatchMoE, arXiv 2509.22279).

    Ours: the paper gives no values.
    """

    alpha: float = 0.01
    """Of the channel part: tokens of one variate spread over experts."""
    beta: float = 0.01
    """Of the temporal part: tokens of one place in time spread over experts."""

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < float("inf") and 0 <= self.beta < float("inf")):
            raise ValueError(f"alpha ({self.alpha}) and beta ({self.beta}) must be at least 0")

    @property
    def is_on(self) -> bool:
        """Whether there is anything to compute."""
        return self.alpha > 0 or self.beta > 0


def temporal_channel_loss(
    routings: Sequence[Routing], config: BalanceLossConfig, *, ranks: Ranks
) -> Tensor:
    """Return this rank's share of the loss of all layers; over ranks the shares add up to it.

    For each variate, over all its tokens of all windows and ranks: how often an expert was chosen,
    scaled so that 1 is even, times its mean score; summed over experts, averaged over variates. The
    temporal part is the same for each place in time, over all variates and windows. Each part is 1
    for even choices and scores, and up to E / K where all go to the same experts. How often an
    expert was chosen carries no gradient; scores carry one to the router alone.

    With one variate the channel part is the usual loss over all tokens; with one patch the temporal
    part is. A part whose groups hold a single token (one window of one patch, or one window of one
    variate) is 0: one token cannot be spread.

    Tokens of patches that are hidden or missing count as any other: they are routed.

    Collective. Over ranks it is the loss of the global batch; micro-batches of one step are
    balanced one by one, so that accumulation changes it a little.

    Args:
        routings: of the expert layers; every rank has as many variates and patches.
        config: weights of the parts.
        ranks: whose tokens count together.

    Raises:
        ValueError: if a router keeps no scores that lead to it alone.

    Source: PatchMoE (arXiv 2509.22279), importance and activation frequency per channel and per
    temporal index. Ours: the closed form, as the paper has none; statistics over the global batch.
    """
    if not routings or not config.is_on:
        device = routings[0].scores_BCNE.device if routings else None
        return torch.zeros((), device=device)
    windows, variates, patches, top_k = routings[0].expert_ids_BCNK.shape
    counts = [_choices(routing) for routing in routings]
    flat = [part.flatten() for by_layer in counts for part in by_layer]
    sizes = [len(part) for part in flat]
    own = torch.tensor([float(windows)], dtype=torch.float64, device=flat[0].device)
    summed = ranks.sum(torch.cat((own, *flat)))
    all_windows = summed[0]
    parts = iter(summed[1:].split(sizes))
    loss = torch.zeros((), device=flat[0].device)
    for routing in routings:
        scores_BCNE = routing.router_scores_BCNE
        if scores_BCNE is None:
            raise ValueError(
                "the balance loss needs a router that scores by softmax (linear or recurrent), in "
                "training; for others set balance_loss.alpha and balance_loss.beta to 0"
            )
        num_experts = scores_BCNE.shape[-1]
        for weight, groups, per_window, summed_axes in (
            (config.alpha, variates, patches, (0, 2)),
            (config.beta, patches, variates, (0, 1)),
        ):
            chosen_GE = next(parts).view(groups, num_experts)
            tokens = all_windows * per_window  # in each group
            frequency_GE = chosen_GE * num_experts / (top_k * tokens)
            share_GE = scores_BCNE.sum(summed_axes) / tokens
            spread = (frequency_GE.to(share_GE.dtype) * share_GE).sum(-1).mean()
            loss = loss + weight * torch.where(tokens > 1, spread, 0).to(loss.dtype)
    return loss


def _choices(routing: Routing) -> tuple[Tensor, Tensor]:
    """Count how often each expert was chosen, by variate and by patch; float64."""
    num_experts = routing.scores_BCNE.shape[-1]
    shape = (*routing.expert_ids_BCNK.shape[:3], num_experts)
    chosen_BCNE = torch.zeros(shape, dtype=torch.float64, device=routing.expert_ids_BCNK.device)
    chosen_BCNE.scatter_(-1, routing.expert_ids_BCNK, 1.0)
    return chosen_BCNE.sum((0, 2)), chosen_BCNE.sum((0, 1))
