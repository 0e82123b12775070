"""Causal attention over the patches of any number of variates.

Shapes: B windows, C variates, N patches, S = C*N tokens in variate-major order, D model width,
H heads; X windows, or windows and variates where each variate is by itself; d is the head width, 1
kept for broadcasting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.nn.rotary import rotary_tables, rotate
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
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
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
            adjacency_BCC: bool, row i names the variates that variate i may look at; its diagonal
                must be True, else a row could be fully masked. None: every variate by itself.
            spans: of a packed window, whose series look at their own past only; not to be had
                together with an adjacency.
        """
        if adjacency_BCC is not None and spans is not None:
            raise ValueError("packed windows have no adjacency: their series are strangers")
        windows, variates, patches, _ = tokens_BCND.shape
        time_index_N = torch.arange(patches, device=tokens_BCND.device)
        if adjacency_BCC is None:
            tokens_XSD = tokens_BCND.flatten(0, 1)
            is_past_X1SS = None
            if spans is not None:
                is_past_X1SS = spans.is_past().flatten(0, 1).unsqueeze(1)
            attended_XSD = self._attend(tokens_XSD, time_index_N, mask=is_past_X1SS)
        else:
            tokens_XSD = tokens_BCND.flatten(1, 2)
            bias_BHSS = self._bias(adjacency_BCC, patches)
            attended_XSD = self._attend(tokens_XSD, time_index_N.repeat(variates), mask=bias_BHSS)
        return self.output(attended_XSD).reshape(windows, variates, patches, -1)

    def _attend(self, tokens_XSD: Tensor, time_index_S: Tensor, mask: Tensor | None) -> Tensor:
        cos_Sd, sin_Sd = rotary_tables(time_index_S, self.head_width, base=self.rotary_base)
        projected = self.query_key_value(tokens_XSD).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        attended_XHSd = F.scaled_dot_product_attention(
            rotate(query, cos_Sd, sin_Sd),
            rotate(key, cos_Sd, sin_Sd),
            value,
            attn_mask=mask,
            is_causal=mask is None,
        )
        return attended_XHSd.transpose(1, 2).flatten(2)

    def _bias(self, adjacency_BCC: Tensor, patches: int) -> Tensor:
        variates = adjacency_BCC.shape[-1]
        device = adjacency_BCC.device
        is_past_NN = torch.ones(patches, patches, dtype=torch.bool, device=device).tril()
        is_allowed_BSS = torch.einsum(
            "bij,mn->bimjn", adjacency_BCC.float(), is_past_NN.float()
        ).reshape(len(adjacency_BCC), variates * patches, variates * patches)
        is_same_SS = torch.eye(variates, dtype=torch.bool, device=device)
        is_same_SS = is_same_SS.repeat_interleave(patches, 0).repeat_interleave(patches, 1)
        bias_HSS = torch.where(
            is_same_SS,
            self.same_variate_bias_H[:, None, None],
            self.other_variate_bias_H[:, None, None],
        )
        return torch.where(is_allowed_BSS[:, None] > 0, bias_HSS, float("-inf"))
