"""Causal attention over the patches of any number of variates.

Shapes: B windows, C variates, N patches, D model width, H heads; X = B*C windows and variates; d is
the head width, 1 kept for broadcasting.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tsmoe.nn.causal_attention import attend_to_past
from tsmoe.nn.graph_attention import attend_over_graph
from tsmoe.nn.query_key_value import QueryKeyValue, wants_pairs
from tsmoe.nn.rotary import rotary_tables, split_rotated
from tsmoe.nn.spans import SeriesSpans


class AnyVariateAttention(nn.Module):
    """Attend to the past of every variate that the adjacency names.

    Score of query (i, m) and key (j, n): the rotary dot product by m - n, scaled, plus `u` of the
    head if i = j, else `v`. Allowed where `adjacency[i, j]` and m >= n, the Kronecker product of
    graph and causal mask. Without an adjacency each variate sees itself alone; then `u` would be a
    constant that softmax cancels and `v` would never be used, so both are left out and take no
    part in channel-independent pretraining.

    Source: Time Tracker (arXiv 2505.15151), Eq. (3). Ours: bias after scaling, per head and layer,
    zero at the start; rotary on the whole head.
    """

    def __init__(self, d_model: int, num_heads: int, *, rotary_base: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = d_model // num_heads
        self.rotary_base = rotary_base
        self.query_key_value = QueryKeyValue(d_model, num_heads)
        self.output = nn.Linear(d_model, d_model, bias=False)
        self.same_variate_bias_H = nn.Parameter(torch.zeros(num_heads))
        self.other_variate_bias_H = nn.Parameter(torch.zeros(num_heads))

    def forward(
        self,
        tokens_BCND: Tensor,
        adjacency_BCC: Tensor | None = None,
        spans: SeriesSpans | None = None,
    ) -> Tensor:
        """Return attended tokens_BCND.

        Args:
            tokens_BCND: normalised tokens.
            adjacency_BCC: bool, or 0 and 1 with a gradient; row i names the variates that variate i
                may look at; its diagonal must be True. None: every variate by itself.
            spans: of a packed window, whose series look at their own past only; not to be had
                together with an adjacency.
        """
        if adjacency_BCC is not None and spans is not None:
            raise ValueError("packed windows have no adjacency: their series are strangers")
        windows, variates, patches, _ = tokens_BCND.shape
        tokens_XND = tokens_BCND.flatten(0, 1)
        time_index_N = torch.arange(patches, device=tokens_BCND.device)
        tables = rotary_tables(time_index_N, self.head_width, base=self.rotary_base)
        is_paired = wants_pairs(tokens_XND)
        projected_XN3D = self.query_key_value(tokens_XND, is_paired=is_paired)
        projected_XN3Hd = projected_XN3D.unflatten(-1, (3, self.num_heads, -1))
        heads = split_rotated(projected_XN3Hd, *tables, is_paired=is_paired)
        if adjacency_BCC is None:
            query, key, value = (part_XNHd.transpose(1, 2) for part_XNHd in heads)
            is_past_X1NN = None if spans is None else spans.is_past().flatten(0, 1).unsqueeze(1)
            attended_XHNd = attend_to_past(query, key, value, is_past_X1NN)
            attended_XNHd = attended_XHNd.transpose(1, 2)
        else:
            query, key, value = (part.unflatten(0, (windows, variates)) for part in heads)
            # Softmax sees only how much a variate is preferred to the others.
            own_bias_H = self.same_variate_bias_H - self.other_variate_bias_H
            attended_XNHd = attend_over_graph(query, key, value, own_bias_H, adjacency_BCC)
        return self.output(attended_XNHd.reshape(windows, variates, patches, -1))
