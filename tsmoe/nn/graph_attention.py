"""Attention over a graph of variates, by the path that fits the device.

Shapes: B windows, C variates, N patches, H heads, d head width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tsmoe.nn.block_sparse import attend_in_tiles
from tsmoe.nn.flex import attend_by_flex

GraphPath = Literal["flex", "tiles"]


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

    Both paths compute the same and hold no matrix over all pairs of tokens.

    Args:
        query_BCNHd: rotated.
        key_BCNHd: rotated.
        value_BCNHd: what is averaged.
        own_bias_H: added to the scaled scores of a variate with itself.
        adjacency_BCC: bool, row i names the variates that variate i may look at, itself among them.
    """
    attend = attend_by_flex if graph_path(query_BCNHd.device) == "flex" else attend_in_tiles
    return attend(query_BCNHd, key_BCNHd, value_BCNHd, own_bias_H, adjacency_BCC)
