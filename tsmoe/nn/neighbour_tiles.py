"""Tiles of gathered keys, where variates have few neighbours.

Shapes: W windows of one kind, C variates, N patches, H heads, d head width, X = W*C, G variates
that have as many neighbours J; Z = H*G batches of a matrix product, R queries and S keys in it; 1
kept for broadcasting.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tsmoe.nn import score_tiles
from tsmoe.nn.score_tiles import product, scale_of, scaled_scores, score_slope, softmax_in_place


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
            slope_ZRS = score_slope(weights_ZRS, grad_ZRd, shift_ZR1, value_ZSd)
            grad_own_H += self._own(slope_ZRS, heads).sum((1, 2, 3), dtype=torch.float64)
            slope_ZRS = slope_ZRS.to(key.dtype)
            grad_query[:, row_G] = product(slope_ZRS, key_ZSd, factor=scale_of(key)).unflatten(
                0, (heads, -1)
            )
            for whole, part_ZSd in (
                (grad_value, grad_value_ZSd),
                (grad_key, product(slope_ZRS.mT, query_ZRd, factor=scale_of(key))),
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
            for row_G in rows.split(max(score_tiles.SCORES_AT_MOST // per_row, 1)):
                other_GJ = self.is_other_XC[row_G].nonzero()[:, 1].unflatten(0, (len(row_G), -1))
                first_of_window_G1 = (row_G - row_G % self.variates)[:, None]
                yield row_G, torch.cat((row_G[:, None], other_GJ + first_of_window_G1), dim=1)

    def _weights(self, query_ZRd: Tensor, key_ZSd: Tensor, own_bias_H: Tensor) -> Tensor:
        scores_ZRS = scaled_scores(query_ZRd, key_ZSd)
        self._own(scores_ZRS, len(own_bias_H)).add_(own_bias_H[:, None, None, None])
        by_step_ZNJN = scores_ZRS.unflatten(2, (-1, self.patches))
        by_step_ZNJN.masked_fill_(self.is_later_N1N, float("-inf"))
        return softmax_in_place(scores_ZRS)

    def _own(self, scores_ZRS: Tensor, heads: int) -> Tensor:
        """Return a view of the scores of variates with themselves, the first of their keys."""
        return scores_ZRS.unflatten(0, (heads, -1))[..., : self.patches]


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
