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

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tsmoe.nn.score_tiles import CausalTiles, NeighbourTiles, Tiles

# A pair of tokens costs more where keys are gathered and products are small than in large blocks
# (measured: benchmarks/attention.py).
GATHERED_PAIR_COST = 3.0


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
        ctx: FunctionCtx,
        query_BCNHd: Tensor,
        key_BCNHd: Tensor,
        value_BCNHd: Tensor,
        own_bias_H: Tensor,
        adjacency_BCC: Tensor,
    ) -> Tensor:
        output_BCNHd = torch.empty_like(query_BCNHd, memory_format=torch.contiguous_format)
        weights: list[Tensor] = []
        is_learning = any(ctx.needs_input_grad)  # type: ignore[attr-defined]
        for windows, tiles in _ways(adjacency_BCC, query_BCNHd.shape[2]):
            query, key, value = (
                tiles.lay_out(part[windows]) for part in (query_BCNHd, key_BCNHd, value_BCNHd)
            )
            kept = weights if is_learning and _is_kept(tiles, query) else None
            attended = tiles.attend(query, key, value, own_bias_H, kept=kept)
            output_BCNHd[windows] = tiles.lay_back(attended)
        inputs = (query_BCNHd, key_BCNHd, value_BCNHd)
        ctx.save_for_backward(*inputs, own_bias_H, adjacency_BCC, output_BCNHd, *weights)
        return output_BCNHd

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_BCNHd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors  # type: ignore[attr-defined]
        inputs, (own_bias_H, adjacency_BCC, output_BCNHd) = saved[:3], saved[3:6]
        weights = iter(saved[6:])
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in inputs]
        grad_own_bias_H = torch.zeros_like(own_bias_H, dtype=torch.float64)
        wide = torch.promote_types(grad_BCNHd.dtype, torch.float32)
        shift_BCNH1 = (grad_BCNHd.to(wide) * output_BCNHd).sum(-1, keepdim=True)
        for windows, tiles in _ways(adjacency_BCC, grad_BCNHd.shape[2]):
            query, key, value, grad, shift = (
                tiles.lay_out(part[windows]) for part in (*inputs, grad_BCNHd, shift_BCNH1)
            )
            kept = weights if _is_kept(tiles, query) else None
            *found, grad_own_H = tiles.backward(
                query, key, value, own_bias_H, grad, shift, kept=kept
            )
            for whole, part in zip(grads, found, strict=True):
                whole[windows] = tiles.lay_back(part)
            grad_own_bias_H += grad_own_H
        return grads[0], grads[1], grads[2], grad_own_bias_H.to(own_bias_H.dtype), None


def _is_kept(tiles: Tiles, query: Tensor) -> bool:
    """Say whether all weights are smaller than query, key, value and output, which are kept too."""
    weight_bytes = torch.promote_types(query.dtype, torch.float32).itemsize
    return tiles.scores_per_query * weight_bytes <= 4 * query.shape[-1] * query.itemsize


def _ways(adjacency_BCC: Tensor, patches: int) -> list[tuple[Tensor | slice, Tiles]]:
    """Return each way that any window goes, and which windows go it."""
    is_gathered_B = is_gathered(adjacency_BCC, patches)
    ways: list[tuple[Tensor | slice, Tiles]] = []
    for is_way_B, kind in ((is_gathered_B, NeighbourTiles), (~is_gathered_B, CausalTiles)):
        if bool(is_way_B.all()):
            ways.append((slice(None), kind(adjacency_BCC, patches)))  # no copies for an index
        elif bool(is_way_B.any()):
            windows_W = is_way_B.nonzero()[:, 0]
            ways.append((windows_W, kind(adjacency_BCC[windows_W], patches)))
    return ways
