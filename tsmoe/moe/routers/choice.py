"""Choose the experts with the best scores, and say how clear the choice was.

Shapes: B windows, C variates, N patches, K experts per token, E routed experts.
"""

from __future__ import annotations

from torch import Tensor

from tsmoe.moe.assignment import count_choices
from tsmoe.moe.routing import Decision


def choose_experts(
    scores_BCNE: Tensor, bias_E: Tensor, *, top_k: int, is_counted_BCN: Tensor | None = None
) -> Decision:
    """Choose the `top_k` best of score plus bias, and count what was chosen.

    Args:
        scores_BCNE: detached.
        bias_E: raises or lowers an expert in the choice alone.
        top_k: experts per token.
        is_counted_BCN: decisions that count in the load; None: all.
    """
    num_experts = scores_BCNE.shape[-1]
    best = (scores_BCNE + bias_E).topk(min(top_k + 1, num_experts), dim=-1)
    expert_ids_BCNK = best.indices[..., :top_k]
    counted, values = expert_ids_BCNK, best.values
    if is_counted_BCN is not None:
        counted, values = counted[is_counted_BCN], values[is_counted_BCN]
    missed = values[..., top_k:]  # empty where all experts are chosen
    return Decision(
        expert_ids_BCNK=expert_ids_BCNK,
        load_E=count_choices(counted, num_experts),
        margin=(values[..., top_k - 1 : top_k] - missed).mean(),
    )


def weigh_chosen(scores_BCNE: Tensor, expert_ids_BCNK: Tensor) -> Tensor:
    """Return the scores of the chosen experts, scaled to a sum of 1 where there are several.

    A single weight so scaled would be 1 whatever the score: no gradient to the router.
    """
    chosen_BCNK = scores_BCNE.gather(-1, expert_ids_BCNK)
    if expert_ids_BCNK.shape[-1] == 1:
        return chosen_BCNK
    return chosen_BCNK / chosen_BCNK.sum(-1, keepdim=True)
