"""The joint projection to queries, keys and values.

Shapes: D model width; d is the head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QueryKeyValue(nn.Linear):
    """One matrix product for all three, in the order of coordinates that rotation wants.

    Rotary embedding turns coordinate i of a head together with i + d/2. Where it is told so, it
    multiplies complex numbers instead, whose parts are neighbours: then rows of the matrix are
    taken in that order, as dot products of queries and keys do not depend on it.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__(d_model, 3 * d_model, bias=False)
        self.num_heads = num_heads

    def forward(self, tokens: Tensor, *, is_paired: bool = False) -> Tensor:
        """Map (..., D) to (..., 3D), coordinates of queries and keys in pairs if wanted."""
        weight = self.weight
        if is_paired:
            weight = rows_in_pairs(weight, self)
        return F.linear(tokens, weight)


def rows_in_pairs(weight: Tensor, projection: QueryKeyValue) -> Tensor:
    """Order the rows of a matrix with 3D outputs so that coordinates to turn are neighbours."""
    turned, value = weight.tensor_split((2 * projection.in_features,))
    by_half = turned.unflatten(0, (2 * projection.num_heads, 2, -1))
    return torch.cat((by_half.transpose(1, 2).flatten(0, 2), value))


def wants_pairs(tokens: Tensor) -> bool:
    """Say whether rotation of such tokens is faster by pairs.

    On the processor it is: halves of a head make inner loops of d/2 numbers. 256 windows of 14
    tokens, 4 heads of 64, forward and backward: 2 ms instead of 9. The compiler joins the steps
    over halves by itself, and CUDA multiplies no complex numbers in bfloat16.
    """
    return tokens.device.type == "cpu" and not torch.compiler.is_compiling()
