"""Attention over a graph of variates that never holds a matrix over all pairs of tokens.

Scores are made and used in tiles of bounded size. Kept are queries, keys, values and output; the
weights too where they are few and so at most double that, else they are made again in the backward
pass. A window goes one of two ways:
`CausalTiles` lay tokens out by time, so that all keys of the past are one block and none of the
future is multiplied; `NeighbourTiles` gather for each variate the keys of its neighbours alone.

Shapes: B windows, C variates, N patches, H heads, d head width; Z batches of a matrix product, R
queries and S keys in it.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tsmoe.nn.causal_tiles import CausalTiles
from tsmoe.nn.neighbour_tiles import NeighbourTiles
from tsmoe.nn.score_tiles import Tiles

# A pair of tokens costs more where keys are gathered and products are small than in large blocks
# (measured: benchmarks/attention.py).
GATHERED_PAIR_COST = 4.0

# Some windows of a batch, and how they are attended over.
_Way = tuple[Tensor | slice, Tiles]


def attend_in_tiles(
    query_BCNHd: Tensor,
    key_BCNHd: Tensor,
    value_BCNHd: Tensor,
    own_bias_H: Tensor,
    adjacency_BCC: Tensor,
) -> Tensor:
    """Attend from each token to the past of the neighbours of its variate.

    Equal to softmax attention with a mask of S x S pairs, gradients included. Time and memory grow
    with the neighbours, or with half of all pairs where these are many.

    Args:
        query_BCNHd: rotated; scores are scaled by the root of d.
        key_BCNHd: rotated.
        value_BCNHd: what is averaged.
        own_bias_H: added to the scores of a variate with itself.
        adjacency_BCC: bool, row i names the variates that variate i may look at.

    Raises:
        ValueError: if a variate may not look at itself: its first token would see nothing.
    """
    if not bool(adjacency_BCC.diagonal(dim1=1, dim2=2).all()):
        window, variate = (~adjacency_BCC.diagonal(dim1=1, dim2=2)).nonzero()[0].tolist()
        raise ValueError(
            f"variate {variate} of window {window} may not look at itself; "
            "the diagonal of adjacency_BCC must be True"
        )
    return _TiledAttention.apply(query_BCNHd, key_BCNHd, value_BCNHd, own_bias_H, adjacency_BCC)


def is_gathered(adjacency_BCC: Tensor, patches: int) -> Tensor:
    """Return is_gathered_B: windows with so few neighbours that gathering them is cheaper."""
    variates = adjacency_BCC.shape[-1]
    pairs_B = adjacency_BCC.sum((1, 2), dtype=torch.int64) * patches**2
    causal_pairs = CausalTiles.pairs(variates, patches)
    return pairs_B * GATHERED_PAIR_COST < causal_pairs


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # torch types no attributes of it
        query_BCNHd: Tensor,
        key_BCNHd: Tensor,
        value_BCNHd: Tensor,
        own_bias_H: Tensor,
        adjacency_BCC: Tensor,
    ) -> Tensor:
        ways = _ways(adjacency_BCC, query_BCNHd.shape[2])
        is_learning = any(ctx.needs_input_grad)
        attended, saved = [], []
        for windows, tiles in ways:
            # Kept as laid out: what they are views of can be freed, and is twice as large.
            query, key, value = (
                tiles.lay_out(part[windows]) for part in (query_BCNHd, key_BCNHd, value_BCNHd)
            )
            weights: list[Tensor] = []
            kept = weights if is_learning and _is_kept(tiles, query) else None
            attended.append(tiles.lay_back(tiles.attend(query, key, value, own_bias_H, kept=kept)))
            saved.append((query, key, value, *weights))
        output_BCNHd = _join(ways, attended).contiguous()
        ctx.ways, ctx.counts = ways, [len(tensors) for tensors in saved]
        ctx.save_for_backward(output_BCNHd, own_bias_H, *chain.from_iterable(saved))
        return output_BCNHd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCNHd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        output_BCNHd, own_bias_H, *rest = ctx.saved_tensors
        saved = iter(rest)
        wide = torch.promote_types(grad_BCNHd.dtype, torch.float32)
        shift_BCNH1 = (grad_BCNHd.to(wide) * output_BCNHd).sum(-1, keepdim=True)
        grads: list[list[Tensor]] = [[], [], []]
        grad_own_H = torch.zeros_like(own_bias_H, dtype=torch.float64)
        for (windows, tiles), count in zip(ctx.ways, ctx.counts, strict=True):
            query, key, value, *weights = islice(saved, count)
            grad, shift = (tiles.lay_out(part[windows]) for part in (grad_BCNHd, shift_BCNH1))
            *found, found_own_H = tiles.backward(
                query, key, value, own_bias_H, grad, shift, kept=iter(weights) if weights else None
            )
            for parts, part in zip(grads, found, strict=True):
                parts.append(tiles.lay_back(part))
            grad_own_H += found_own_H
        query, key, value = (_join(ctx.ways, parts) for parts in grads)
        return query, key, value, grad_own_H.to(own_bias_H.dtype), None


def _join(ways: list[_Way], parts: list[Tensor]) -> Tensor:
    """Put together what came of each way."""
    if len(ways) == 1:
        return parts[0]
    whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for (windows, _), part in zip(ways, parts, strict=True):
        whole[windows] = part
    return whole


def _is_kept(tiles: Tiles, query: Tensor) -> bool:
    """Say whether all weights are smaller than query, key, value and output, which are kept too."""
    weight_bytes = torch.promote_types(query.dtype, torch.float32).itemsize
    return tiles.scores_per_query * weight_bytes <= 4 * query.shape[-1] * query.itemsize


def _ways(adjacency_BCC: Tensor, patches: int) -> list[_Way]:
    """Return each way that any window goes, and which windows go it."""
    is_gathered_B = is_gathered(adjacency_BCC, patches)
    ways: list[_Way] = []
    for is_way_B, kind in ((is_gathered_B, NeighbourTiles), (~is_gathered_B, CausalTiles)):
        if bool(is_way_B.all()):
            ways.append((slice(None), kind(adjacency_BCC, patches)))  # no copies for an index
        elif bool(is_way_B.any()):
            windows_W = is_way_B.nonzero()[:, 0]
            ways.append((windows_W, kind(adjacency_BCC[windows_W], patches)))
    return ways
