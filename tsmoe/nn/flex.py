"""Attention over a graph of variates by FlexAttention: one compiled kernel that skips empty blocks.

Shapes: B windows, C variates, N patches, H heads, d head width, S = C*N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# FlexAttention skips blocks of so many queries by so many keys.
BLOCK_TOKENS = 128


@dataclass(frozen=True)
class TokenOrder:
    """Where a token of a window lies in the sequence that the kernel sees."""

    variates: int
    patches: int

    @property
    def is_by_time(self) -> bool:
        """Whether steps are the outer axis.

        With as many variates as a block has tokens, blocks by time lie wholly before or wholly
        after each other, and half are skipped whatever the graph. With fewer, blocks by variate
        are of few variates, so that the graph leaves more of them empty.
        """
        return self.variates >= BLOCK_TOKENS

    def variate(self, token: Tensor) -> Tensor:
        """Return the variate of a token, given its place."""
        return token % self.variates if self.is_by_time else token // self.patches

    def step(self, token: Tensor) -> Tensor:
        """Return the time step of a token, given its place."""
        return token // self.variates if self.is_by_time else token % self.patches

    def lay_out(self, heads_BCNHd: Tensor) -> Tensor:
        """Return heads_BHSd."""
        axes = (0, 3, 2, 1, 4) if self.is_by_time else (0, 3, 1, 2, 4)
        return heads_BCNHd.permute(axes).flatten(2, 3)

    def lay_back(self, heads_BHSd: Tensor) -> Tensor:
        """Return heads_BCNHd."""
        if self.is_by_time:
            return heads_BHSd.unflatten(2, (self.patches, self.variates)).permute(0, 3, 2, 1, 4)
        return heads_BHSd.unflatten(2, (self.variates, self.patches)).permute(0, 2, 3, 1, 4)


def mask_function(adjacency_BCC: Tensor, order: TokenOrder) -> Callable[..., Tensor]:
    """Return the function of window, head, query and key that says what is attended to."""

    def is_allowed(window: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_neighbour = adjacency_BCC[window, order.variate(query), order.variate(key)]
        return is_neighbour & (order.step(query) >= order.step(key))

    return is_allowed


def score_function(own_bias_H: Tensor, order: TokenOrder) -> Callable[..., Tensor]:
    """Return the function that adds the bias of a variate with itself to a score."""

    def biased(score: Tensor, _window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_own = order.variate(query) == order.variate(key)
        return torch.where(is_own, score + own_bias_H[head], score)

    return biased


def attend_by_flex(
    query_BCNHd: Tensor,
    key_BCNHd: Tensor,
    value_BCNHd: Tensor,
    own_bias_H: Tensor,
    adjacency_BCC: Tensor,
) -> Tensor:
    """Attend from each token to the past of the neighbours of its variate, on CUDA.

    The block mask is made anew for each layer, from the graph of each window, on the device: no
    wait for it. Arguments are those of `attend_in_tiles`.
    """
    attend, make_block_mask = _compiled()
    windows, variates, patches, *_ = query_BCNHd.shape
    order = TokenOrder(variates, patches)
    tokens = variates * patches
    block_mask = make_block_mask(
        mask_function(adjacency_BCC, order), windows, None, tokens, tokens, query_BCNHd.device
    )
    heads = (order.lay_out(part) for part in (query_BCNHd, key_BCNHd, value_BCNHd))
    # The gradient of the bias is a sum over all pairs: kept in float32.
    bias = score_function(own_bias_H.float(), order)
    return order.lay_back(attend(*heads, score_mod=bias, block_mask=block_mask))


@cache
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., object]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Whole graphs: too many shapes must be an error, not a fall back to S x S scores.
    return (
        torch.compile(flex_attention, fullgraph=True),
        torch.compile(create_block_mask, fullgraph=True),
    )
