"""Attention over a graph of variates, by the path that fits the device.

Shapes: B windows, C variates, N patches, H heads, d head width, S = C*N tokens of a window.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tsmoe.nn.block_sparse import attend_in_tiles
from tsmoe.nn.flex import attend_by_flex

GraphPath = Literal["flex", "tiles"]

_LARGEST_EXPONENT = 30.0


def graph_path(device: torch.device) -> GraphPath:
    """Return the path of a device: FlexAttention has a backward pass on CUDA alone."""
    return "flex" if device.type == "cuda" else "tiles"


def attend_over_graph(
    query_BCNHd: Tensor,
    key_BCNHd: Tensor,
    value_BCNHd: Tensor,
    own_bias_H: Tensor,
    adjacency_BCC: Tensor,
) -> Tensor:
    """Attend from each token to the past of the neighbours of its variate.

    Both paths compute the same and hold no matrix over all pairs of tokens. A graph whose edges are
    to learn from the gradient is attended over densely, as an edge that is absent has one too.

    Args:
        query_BCNHd: rotated.
        key_BCNHd: rotated.
        value_BCNHd: what is averaged.
        own_bias_H: added to the scaled scores of a variate with itself.
        adjacency_BCC: bool, row i names the variates that variate i may look at, itself among them;
            or numbers of 0 and 1 that want a gradient.
    """
    if adjacency_BCC.is_floating_point():
        return attend_densely(query_BCNHd, key_BCNHd, value_BCNHd, own_bias_H, adjacency_BCC)
    attend = attend_by_flex if graph_path(query_BCNHd.device) == "flex" else attend_in_tiles
    return attend(query_BCNHd, key_BCNHd, value_BCNHd, own_bias_H, adjacency_BCC)


def attend_densely(
    query_BCNHd: Tensor,
    key_BCNHd: Tensor,
    value_BCNHd: Tensor,
    own_bias_H: Tensor,
    adjacency_BCC: Tensor,
) -> Tensor:
    """Attend with a matrix over all pairs of tokens, to which edges are weights.

    An edge of 1 counts fully and one of 0 not at all, so that the result is that of a mask; the
    gradient of an edge says how much more or less of it would help. Memory grows with (C*N)^2.

    Args:
        adjacency_BCC: float, 0 or 1, with 1 on the diagonal; the others as `attend_over_graph`.
    """
    variates, patches = query_BCNHd.shape[1:3]
    query, key, value = (
        part.flatten(1, 2).transpose(1, 2) for part in (query_BCNHd, key_BCNHd, value_BCNHd)
    )
    scores_BHSS = (query @ key.mT).float() * query.shape[-1] ** -0.5
    variate_S = torch.arange(variates, device=query.device).repeat_interleave(patches)
    step_S = torch.arange(patches, device=query.device).repeat(variates)
    is_own_SS = variate_S[:, None] == variate_S
    scores_BHSS = scores_BHSS + is_own_SS * own_bias_H.float()[:, None, None]
    is_later_SS = step_S[:, None] < step_S
    scores_BHSS = scores_BHSS.masked_fill(is_later_SS, float("-inf"))
    # Of the edges that are there, so that one score of an absent edge cannot hide all others.
    is_absent_BSS = (adjacency_BCC.detach() == 0)[:, variate_S][:, :, variate_S]
    largest_BHS1 = scores_BHSS.detach().masked_fill(is_absent_BSS[:, None], float("-inf"))
    largest_BHS1 = largest_BHS1.amax(-1, keepdim=True)
    # An absent edge that scores far higher keeps a finite gradient.
    weights_BHSS = (scores_BHSS - largest_BHS1).clamp(max=_LARGEST_EXPONENT).exp()
    weights_BHSS = weights_BHSS * adjacency_BCC.float()[:, variate_S][:, :, variate_S][:, None]
    weights_BHSS = weights_BHSS / weights_BHSS.sum(-1, keepdim=True)
    attended_BHSd = weights_BHSS.to(value.dtype) @ value
    return attended_BHSd.transpose(1, 2).unflatten(1, (variates, patches))
