"""Tiles of attention scores: which queries meet which keys in one matrix product.

Rows are whole: all keys of a query are in one tile, so that softmax needs no second pass. Both
kinds of tiles are made anew in each pass; they hold the graph and no activations.

Shapes: W windows of one kind, C variates, N patches, H heads, d head width, X = W*C; Z batches of a
matrix product, R queries and S keys in it, G variates that have as many neighbours J; 1 kept for
broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Entries of one tile: large enough for fast products, small enough for the cache of a core.
SCORES_AT_MOST = 2**19
# Queries that a block of `CausalTiles` takes at least: of several steps where variates are few.
QUERIES_AT_LEAST = 96


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
            slope_ZRS = _score_slope(weights_ZRS, grad_ZRd, shift_ZR1, tile.keys(value))
            own_Z = self._own(tile, slope_ZRS).sum((1, 2, 3), dtype=torch.float64)
            grad_own_H.index_add_(0, tile.batch_numbers(self.device) % heads, own_Z)
            slope_ZRS = slope_ZRS.to(key.dtype)
            target = tile.queries(grad_query)
            _product_into(target, slope_ZRS, tile.keys(key), factor=_scale(key))
            _accumulate(
                tile.keys(grad_key), slope_ZRS.mT, query_ZRd, factor=_scale(query), beta=beta
            )
        return grad_query, grad_key.to(key.dtype), grad_value.to(key.dtype), grad_own_H

    def _tiles(self, batches: int) -> Iterator[_Block]:
        # Latest first: the first tile of a batch has all its keys.
        for start in reversed(range(0, self.patches, self.steps)):
            end = min(start + self.steps, self.patches)
            scores_per_row = (end - start) * end * self.variates
            rows = min(max(SCORES_AT_MOST // scores_per_row, 1), self.variates)
            # Even parts: a small last one would be a slow product.
            rows = -(-self.variates // -(-self.variates // rows))
            at_once = min(max(SCORES_AT_MOST // (scores_per_row * rows), 1), batches)
            for z in range(0, batches, at_once):
                for row in range(0, self.variates, rows):
                    yield _Block(
                        batches=slice(z, min(z + at_once, batches)),
                        steps=slice(start, end),
                        rows=slice(row, min(row + rows, self.variates)),
                        is_first=end == self.patches and row == 0,
                    )

    def _weights(self, tile: _Block, query: Tensor, key: Tensor, own_bias_H: Tensor) -> Tensor:
        scores_ZRS = _scores(tile.queries(query).flatten(1, 2), tile.keys(key))
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
        return _softmax(scores_ZRS)

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


class NeighbourTiles:
    """For each variate the keys of its neighbours, gathered; itself comes first among them."""

    def __init__(self, adjacency_WCC: Tensor, patches: int) -> None:
        self.windows, self.variates, _ = adjacency_WCC.shape
        self.patches = patches
        step_N = torch.arange(patches, device=adjacency_WCC.device)
        self.is_later_N1N = step_N[None, None, :] > step_N[:, None, None]
        is_other_XC = adjacency_WCC.clone()
        is_other_XC.diagonal(dim1=1, dim2=2).fill_(False)
        self.is_other_XC = is_other_XC.flatten(0, 1)

    @property
    def scores_per_query(self) -> float:
        """Scores that are made for one query of one head, on average."""
        return self.patches * (1 + float(self.is_other_XC.sum()) / len(self.is_other_XC))

    def lay_out(self, heads_WCNHd: Tensor) -> Tensor:
        """Return heads_HXNd, X = W*C."""
        return heads_WCNHd.flatten(0, 1).permute(2, 0, 1, 3).contiguous()

    def lay_back(self, heads_HXNd: Tensor) -> Tensor:
        """Return heads_WCNHd."""
        return heads_HXNd.permute(1, 2, 0, 3).unflatten(0, (self.windows, -1))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_bias_H: Tensor,
        *,
        kept: list[Tensor] | None,
    ) -> Tensor:
        """Return attended_HXNd."""
        attended_HXNd = torch.empty_like(query)
        for row_G, neighbour_GJ in self._groups(query):
            query_ZRd, key_ZSd, value_ZSd = _gather(query, key, value, row_G, neighbour_GJ)
            weights_ZRS = self._weights(query_ZRd, key_ZSd, own_bias_H)
            if kept is not None:
                kept.append(weights_ZRS)
            found_ZRd = weights_ZRS.to(value.dtype) @ value_ZSd
            attended_HXNd[:, row_G] = found_ZRd.unflatten(0, (len(query), -1))
        return attended_HXNd

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
        heads = len(query)
        grad_query = torch.empty_like(query)
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(key, dtype=wide), torch.zeros_like(key, dtype=wide)
        grad_own_H = torch.zeros(heads, dtype=torch.float64, device=query.device)
        for row_G, neighbour_GJ in self._groups(query):
            query_ZRd, key_ZSd, value_ZSd = _gather(query, key, value, row_G, neighbour_GJ)
            grad_ZRd, shift_ZR1 = (part[:, row_G].flatten(0, 1) for part in (grad, shift))
            weights_ZRS = next(kept) if kept else self._weights(query_ZRd, key_ZSd, own_bias_H)
            grad_value_ZSd = weights_ZRS.to(value.dtype).mT @ grad_ZRd
            slope_ZRS = _score_slope(weights_ZRS, grad_ZRd, shift_ZR1, value_ZSd)
            grad_own_H += self._own(slope_ZRS, heads).sum((1, 2, 3), dtype=torch.float64)
            slope_ZRS = slope_ZRS.to(key.dtype)
            grad_query[:, row_G] = _product(slope_ZRS, key_ZSd, factor=_scale(key)).unflatten(
                0, (heads, -1)
            )
            for whole, part_ZSd in (
                (grad_value, grad_value_ZSd),
                (grad_key, _product(slope_ZRS.mT, query_ZRd, factor=_scale(key))),
            ):
                part = part_ZSd.view(heads, neighbour_GJ.numel(), *whole.shape[2:])
                whole.index_add_(1, neighbour_GJ.flatten(), part.to(wide))
        return grad_query, grad_key.to(key.dtype), grad_value.to(key.dtype), grad_own_H

    def _groups(self, heads_HXNd: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield row_G and neighbour_GJ, numbers of variates within X, in groups of like degree."""
        heads, _, patches, width = heads_HXNd.shape
        others_X = self.is_other_XC.sum(-1)
        for others in others_X.unique().tolist():
            rows = (others_X == others).nonzero()[:, 0]
            # Gathered keys and values are held beside the scores.
            per_row = heads * (others + 1) * patches * max(patches, width)
            for row_G in rows.split(max(SCORES_AT_MOST // per_row, 1)):
                other_GJ = self.is_other_XC[row_G].nonzero()[:, 1].unflatten(0, (len(row_G), -1))
                first_of_window_G1 = (row_G - row_G % self.variates)[:, None]
                yield row_G, torch.cat((row_G[:, None], other_GJ + first_of_window_G1), dim=1)

    def _weights(self, query_ZRd: Tensor, key_ZSd: Tensor, own_bias_H: Tensor) -> Tensor:
        scores_ZRS = _scores(query_ZRd, key_ZSd)
        self._own(scores_ZRS, len(own_bias_H)).add_(own_bias_H[:, None, None, None])
        by_step_ZNJN = scores_ZRS.unflatten(2, (-1, self.patches))
        by_step_ZNJN.masked_fill_(self.is_later_N1N, float("-inf"))
        return _softmax(scores_ZRS)

    def _own(self, scores_ZRS: Tensor, heads: int) -> Tensor:
        """Return a view of the scores of variates with themselves, the first of their keys."""
        return scores_ZRS.unflatten(0, (heads, -1))[..., : self.patches]


def _steps_per_block(variates: int, patches: int) -> int:
    return min(-(-QUERIES_AT_LEAST // variates), patches)


def _gather(
    query_HXNd: Tensor, key_HXNd: Tensor, value_HXNd: Tensor, row_G: Tensor, neighbour_GJ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query_ZRd, key_ZSd and value_ZSd, Z = H*G, R = N, S = J*N."""
    heads, _, _, width = query_HXNd.shape
    batches = heads * len(row_G)
    query_ZRd = query_HXNd.index_select(1, row_G).flatten(0, 1)
    key_ZSd, value_ZSd = (
        part.index_select(1, neighbour_GJ.flatten()).view(batches, -1, width)
        for part in (key_HXNd, value_HXNd)
    )
    return query_ZRd, key_ZSd, value_ZSd


def _scores(query_ZRd: Tensor, key_ZSd: Tensor) -> Tensor:
    # Never below float32: rounded to bfloat16 a score of 8 is off by 0.03, its weight by 3 %.
    wide = torch.promote_types(query_ZRd.dtype, torch.float32)
    return _product(query_ZRd.to(wide), key_ZSd.to(wide).mT, factor=_scale(query_ZRd))


def _product(left: Tensor, right: Tensor, *, factor: float) -> Tensor:
    # The factor costs nothing within the product; what is added is ignored, as beta is 0.
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=factor)


def _scale(heads: Tensor) -> float:
    return heads.shape[-1] ** -0.5


def _softmax(scores_ZRS: Tensor) -> Tensor:
    return torch.softmax(scores_ZRS, dim=-1, out=scores_ZRS)


def _score_slope(
    weights_ZRS: Tensor, grad_ZRd: Tensor, shift_ZR1: Tensor, value_ZSd: Tensor
) -> Tensor:
    """Return the gradient of the scores."""
    slope_ZRS = (grad_ZRd @ value_ZSd.mT).to(weights_ZRS.dtype)
    return slope_ZRS.sub_(shift_ZR1).mul_(weights_ZRS)


def _product_into(
    target_ZNCd: Tensor, weights_ZRS: Tensor, right_ZSd: Tensor, *, factor: float = 1.0
) -> None:
    weights_ZRS = weights_ZRS.to(right_ZSd.dtype)
    _, steps, rows, _ = target_ZNCd.shape
    if steps == 1 or target_ZNCd.stride(1) == rows * target_ZNCd.stride(2):  # flat without a copy
        target_ZNCd.flatten(1, 2).baddbmm_(weights_ZRS, right_ZSd, beta=0, alpha=factor)
    else:
        target_ZNCd.copy_(_product(weights_ZRS, right_ZSd, factor=factor).view_as(target_ZNCd))


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
        sum_ZSd.copy_(_product(left_ZSR, right_ZRd, factor=factor))
