"""Tiles of all variates of a window by time, where each has many neighbours.

Shapes: W windows of one kind, C variates, N patches, H heads, d head width; Z = W*H batches of a
matrix product, R queries and S keys in it; 1 kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tsmoe.nn import score_tiles
from tsmoe.nn.score_tiles import product, scale_of, scaled_scores, score_slope, softmax_in_place

# Queries that a block takes at least: of several steps where variates are few.
QUERIES_AT_LEAST = 96


class CausalTiles:
    """All variates of a window, by time: the past of a time step is one block of keys."""

    def __init__(self, adjacency_WCC: Tensor, patches: int) -> None:
        self.windows, self.variates, _ = adjacency_WCC.shape
        self.patches = patches
        self.device = adjacency_WCC.device
        self.steps = _steps_per_block(self.variates, patches)
        self.is_absent_WCC = None if bool(adjacency_WCC.all()) else ~adjacency_WCC

    @property
    def scores_per_query(self) -> float:
        """Scores that are made for one query of one head, on average."""
        return self.pairs(self.variates, self.patches) / (self.variates * self.patches)

    @staticmethod
    def pairs(variates: int, patches: int) -> int:
        """Count the pairs of tokens of a window that are multiplied."""
        steps = _steps_per_block(variates, patches)
        starts = range(0, patches, steps)
        ends = [min(start + steps, patches) for start in starts]
        return variates**2 * sum((e - s) * e for s, e in zip(starts, ends, strict=True))

    def lay_out(self, heads_WCNHd: Tensor) -> Tensor:
        """Return heads_ZNCd, Z = W*H."""
        return heads_WCNHd.permute(0, 3, 2, 1, 4).flatten(0, 1).contiguous()

    def lay_back(self, heads_ZNCd: Tensor) -> Tensor:
        """Return heads_WCNHd."""
        return heads_ZNCd.unflatten(0, (self.windows, -1)).permute(0, 3, 2, 1, 4)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_bias_H: Tensor,
        *,
        kept: list[Tensor] | None,
    ) -> Tensor:
        """Return attended_ZNCd."""
        attended_ZNCd = torch.empty_like(query)
        for tile in self._tiles(len(query)):
            weights_ZRS = self._weights(tile, query, key, own_bias_H)
            if kept is not None:
                kept.append(weights_ZRS)
            _product_into(tile.queries(attended_ZNCd), weights_ZRS, tile.keys(value))
        return attended_ZNCd

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
        """Return gradients of query, key and value, as laid out, and of own_bias_H."""
        grad_query = torch.empty_like(query)
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = (torch.empty_like(key, dtype=wide) for _ in range(2))
        heads = len(own_bias_H)
        grad_own_H = torch.zeros(heads, dtype=torch.float64, device=self.device)
        for tile in self._tiles(len(query)):
            weights_ZRS = next(kept) if kept else self._weights(tile, query, key, own_bias_H)
            query_ZRd, grad_ZRd, shift_ZR1 = (
                tile.queries(part).flatten(1, 2) for part in (query, grad, shift)
            )
            beta = 0 if tile.is_first else 1
            _accumulate(tile.keys(grad_value), weights_ZRS.mT, grad_ZRd, beta=beta)
            slope_ZRS = score_slope(weights_ZRS, grad_ZRd, shift_ZR1, tile.keys(value))
            own_Z = self._own(tile, slope_ZRS).sum((1, 2, 3), dtype=torch.float64)
            grad_own_H.index_add_(0, tile.batch_numbers(self.device) % heads, own_Z)
            slope_ZRS = slope_ZRS.to(key.dtype)
            target = tile.queries(grad_query)
            _product_into(target, slope_ZRS, tile.keys(key), factor=scale_of(key))
            _accumulate(
                tile.keys(grad_key), slope_ZRS.mT, query_ZRd, factor=scale_of(query), beta=beta
            )
        return grad_query, grad_key.to(key.dtype), grad_value.to(key.dtype), grad_own_H

    def _tiles(self, batches: int) -> Iterator[_Block]:
        # Latest first: the first tile of a batch has all its keys.
        for start in reversed(range(0, self.patches, self.steps)):
            end = min(start + self.steps, self.patches)
            scores_per_row = (end - start) * end * self.variates
            rows = min(max(score_tiles.SCORES_AT_MOST // scores_per_row, 1), self.variates)
            # Even parts: a small last one would be a slow product.
            rows = -(-self.variates // -(-self.variates // rows))
            at_once = min(max(score_tiles.SCORES_AT_MOST // (scores_per_row * rows), 1), batches)
            for z in range(0, batches, at_once):
                for row in range(0, self.variates, rows):
                    yield _Block(
                        batches=slice(z, min(z + at_once, batches)),
                        steps=slice(start, end),
                        rows=slice(row, min(row + rows, self.variates)),
                        is_first=end == self.patches and row == 0,
                    )

    def _weights(self, tile: _Block, query: Tensor, key: Tensor, own_bias_H: Tensor) -> Tensor:
        scores_ZRS = scaled_scores(tile.queries(query).flatten(1, 2), tile.keys(key))
        heads = len(own_bias_H)
        batches_Z = tile.batch_numbers(self.device)
        self._own(tile, scores_ZRS).add_(own_bias_H[batches_Z % heads][:, None, None, None])
        scores = self._by_variate(tile, scores_ZRS)
        if self.is_absent_WCC is not None:
            is_absent_ZRC = self.is_absent_WCC[batches_Z // heads, tile.rows]
            scores.masked_fill_(is_absent_ZRC[:, None, :, None, :], float("-inf"))
        if (count := tile.steps.stop - tile.steps.start) > 1:
            step_N = torch.arange(tile.steps.stop, device=self.device)
            is_later_1N = step_N > step_N[-count:, None]
            scores.masked_fill_(is_later_1N[:, None, :, None], float("-inf"))
        return softmax_in_place(scores_ZRS)

    def _by_variate(self, tile: _Block, scores_ZRS: Tensor) -> Tensor:
        """Return a view with axes Z, step and variate of the query, step and variate of the key."""
        steps = tile.steps.stop - tile.steps.start
        return scores_ZRS.unflatten(2, (tile.steps.stop, -1)).unflatten(1, (steps, -1))

    def _own(self, tile: _Block, scores_ZRS: Tensor) -> Tensor:
        """Return a view of the scores of variates with themselves: Z, two steps and variate."""
        return self._by_variate(tile, scores_ZRS)[..., tile.rows].diagonal(dim1=2, dim2=4)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Some variates at some steps, against all variates at these and earlier ones."""

    batches: slice
    steps: slice
    rows: slice
    is_first: bool

    def queries(self, heads_ZNCd: Tensor) -> Tensor:
        return heads_ZNCd[self.batches, self.steps, self.rows]

    def keys(self, heads_ZNCd: Tensor) -> Tensor:
        return heads_ZNCd[self.batches, : self.steps.stop].flatten(1, 2)

    def batch_numbers(self, device: torch.device) -> Tensor:
        return torch.arange(self.batches.start, self.batches.stop, device=device)


def _steps_per_block(variates: int, patches: int) -> int:
    return min(-(-QUERIES_AT_LEAST // variates), patches)


def _product_into(
    target_ZNCd: Tensor, weights_ZRS: Tensor, right_ZSd: Tensor, *, factor: float = 1.0
) -> None:
    weights_ZRS = weights_ZRS.to(right_ZSd.dtype)
    _, steps, rows, _ = target_ZNCd.shape
    if steps == 1 or target_ZNCd.stride(1) == rows * target_ZNCd.stride(2):  # flat without a copy
        target_ZNCd.flatten(1, 2).baddbmm_(weights_ZRS, right_ZSd, beta=0, alpha=factor)
    else:
        target_ZNCd.copy_(product(weights_ZRS, right_ZSd, factor=factor).view_as(target_ZNCd))


def _accumulate(
    sum_ZSd: Tensor, left_ZSR: Tensor, right_ZRd: Tensor, *, beta: int, factor: float = 1.0
) -> None:
    """Multiply sums by 0 or 1 and add a product."""
    left_ZSR = left_ZSR.to(right_ZRd.dtype)
    if sum_ZSd.dtype == left_ZSR.dtype:
        sum_ZSd.baddbmm_(left_ZSR, right_ZRd, beta=beta, alpha=factor)
    elif beta:
        sum_ZSd.add_(left_ZSR @ right_ZRd, alpha=factor)
    else:
        sum_ZSd.copy_(product(left_ZSR, right_ZRd, factor=factor))
