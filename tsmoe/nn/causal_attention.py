"""Causal attention of each variate to its own past, by the kernel that suits its length.

Shapes: X windows and variates, H heads, N patches, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# On the processor, up to so many tokens the weights are held in full: torch's flash kernel works on
# small blocks one by one, which costs more than it saves. 256 x 4 heads of 14 tokens of 64, forward
# and backward: 10 ms against 16 in float32, 12 against 50 in bfloat16; 512 tokens: 82 against 54.
_FEW_TOKENS = 128


def attend_to_past(
    query_XHNd: Tensor, key_XHNd: Tensor, value_XHNd: Tensor, is_past_X1NN: Tensor | None = None
) -> Tensor:
    """Return attended_XHNd.

    Args:
        query_XHNd: turned by their place in time, as are the keys.
        key_XHNd: of the same tokens.
        value_XHNd: of the same tokens.
        is_past_X1NN: what each token may look at, itself among it; None: all before it.
    """
    if query_XHNd.device.type != "cpu" or query_XHNd.shape[2] > _FEW_TOKENS:
        return F.scaled_dot_product_attention(
            query_XHNd, key_XHNd, value_XHNd, attn_mask=is_past_X1NN,
            is_causal=is_past_X1NN is None,
        )  # fmt: skip
    windows, heads, patches, width = query_XHNd.shape
    if is_past_X1NN is None:
        is_past_1NN = torch.ones(1, patches, patches, dtype=torch.bool).tril()
    else:
        is_past_1NN = is_past_X1NN.expand(-1, heads, -1, -1).flatten(0, 1)
    hidden_1NN = torch.zeros(is_past_1NN.shape, dtype=query_XHNd.dtype).masked_fill_(
        ~is_past_1NN, float("-inf")
    )
    query, key, value = (part.flatten(0, 1) for part in (query_XHNd, key_XHNd, value_XHNd))
    # Mask and scale ride on the product: no pass over the scores for either.
    scores = torch.baddbmm(hidden_1NN, query, key.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), value).unflatten(0, (windows, heads))
