"""What tiles of attention scores have in common: their protocol, size and arithmetic.

A tile is some queries and all their keys in one matrix product, so that softmax needs no second
pass.

Shapes: W windows of one kind, C variates, N patches, H heads, d head width; Z batches of a matrix
product, R queries and S keys in it; 1 kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

# Entries of one tile: large enough for fast products, small enough for the cache of a core.
SCORES_AT_MOST = 2**19


class Tiles(Protocol):
    """A way to attend over the graph of some windows, in a layout of its own."""

    def lay_out(self, heads_WCNHd: Tensor) -> Tensor:
        """Return the heads in the order of this way."""

    def lay_back(self, heads: Tensor) -> Tensor:
        """Undo `lay_out`."""

    @property
    def scores_per_query(self) -> float:
        """Scores that are made for one query of one head, on average."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_bias_H: Tensor,
        *,
        kept: list[Tensor] | None,
    ) -> Tensor:
        """Return what the queries see, laid out; the weights of each tile are added to `kept`."""

    def backward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_bias_H: Tensor,
        grad: Tensor,
        shift: Tensor,
        *,
        kept: Iterator[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return gradients of query, key and value, laid out, and of own_bias_H.

        Args:
            query: as in `attend`, like all that follow.
            key: rotated.
            value: what is averaged.
            own_bias_H: of scores of a variate with itself.
            grad: gradient of what the queries see.
            shift: dot product of that and what they see, head width 1.
            kept: weights of each tile; None: they are made again.
        """


def scaled_scores(query_ZRd: Tensor, key_ZSd: Tensor) -> Tensor:
    """Multiply queries with keys, scaled by the root of the head width."""
    # Never below float32: rounded to bfloat16 a score of 8 is off by 0.03, its weight by 3 %.
    wide = torch.promote_types(query_ZRd.dtype, torch.float32)
    return product(query_ZRd.to(wide), key_ZSd.to(wide).mT, factor=scale_of(query_ZRd))


def product(left: Tensor, right: Tensor, *, factor: float) -> Tensor:
    """Return a product of matrices times a factor, which costs nothing there."""
    # What is added is ignored, as beta is 0.
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=factor)


def scale_of(heads: Tensor) -> float:
    """Return what scores are multiplied by."""
    return heads.shape[-1] ** -0.5


def softmax_in_place(scores_ZRS: Tensor) -> Tensor:
    """Turn scores into weights."""
    return torch.softmax(scores_ZRS, dim=-1, out=scores_ZRS)


def score_slope(
    weights_ZRS: Tensor, grad_ZRd: Tensor, shift_ZR1: Tensor, value_ZSd: Tensor
) -> Tensor:
    """Return the gradient of the scores."""
    slope_ZRS = (grad_ZRd @ value_ZSd.mT).to(weights_ZRS.dtype)
    return slope_ZRS.sub_(shift_ZR1).mul_(weights_ZRS)
