"""One layer of PatchMoE's encoder: attention over the patches of a variate, then experts.

Shapes: B windows, C variates, N patches, D model width, H heads; X = B*C windows and variates; d is
the head width, 1 kept for broadcasting.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.models.block import FeedForwardConfig
from tsmoe.moe.layer import ExpertFactory, MoEConfig, MoELayer
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routing import RouterState, Routing
from tsmoe.nn.feed_forward import SwiGLU


class EncoderBlock(nn.Module):
    """Attention in both directions and feed-forward, each normed after it is added.

    With `norms_first` what each of them sees is normed instead, and their sum is left as it is.

    Source: PatchMoE (arXiv 2509.22279), Eq. (3); each variate by itself, as inferred. Ours:
    `norms_first`, as arXiv 2002.04745 without its norm behind the last layer.
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        dropout: float,
        norms_first: bool,
        feed_forward: FeedForwardConfig,
        layer_index: int,
        num_layers: int,
        seed: int,
        make_experts: ExpertFactory,
    ) -> None:
        super().__init__()
        self.num_heads, self.norms_first = num_heads, norms_first
        # Without bias: that of keys would be learned from rounding errors, as softmax cancels it.
        self.query_key_value = nn.Linear(d_model, 3 * d_model, bias=False)
        self.output = nn.Linear(d_model, d_model)
        self.attention_norm = nn.LayerNorm(d_model)
        self.feed_forward: MoELayer | SwiGLU
        if isinstance(feed_forward, MoEConfig):
            self.feed_forward = MoELayer(
                feed_forward,
                d_model=d_model,
                layer_index=layer_index,
                num_layers=num_layers,
                seed=seed,
                make_experts=make_experts,
            )
        else:
            self.feed_forward = SwiGLU(d_model, feed_forward.d_ff)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens_BCND: Tensor,
        may_see_X11N: Tensor | None,
        state: RouterState | None,
        record: RoutingRecord | None = None,
    ) -> tuple[Tensor, Routing | None, RouterState | None]:
        """Return tokens, the routing (None for a dense block) and the router's state.

        Args:
            tokens_BCND: of the layer before.
            may_see_X11N: bool; tokens that others may look at; None: all.
            state: of the router of the layer before.
            record: for passes that will be computed again, see `RoutingRecord`.
        """
        if self.norms_first:
            seen_BCND = self.attention_norm(tokens_BCND)
            tokens_BCND = tokens_BCND + self.dropout(self._attend(seen_BCND, may_see_X11N))
            seen_BCND = self.feed_forward_norm(tokens_BCND)
            hidden_BCND, routing, state = self._feed_forward(seen_BCND, state, record)
            return tokens_BCND + self.dropout(hidden_BCND), routing, state
        attended_BCND = self.attention_norm(
            tokens_BCND + self.dropout(self._attend(tokens_BCND, may_see_X11N))
        )
        hidden_BCND, routing, state = self._feed_forward(attended_BCND, state, record)
        return self.feed_forward_norm(attended_BCND + self.dropout(hidden_BCND)), routing, state

    def _feed_forward(
        self, tokens_BCND: Tensor, state: RouterState | None, record: RoutingRecord | None
    ) -> tuple[Tensor, Routing | None, RouterState | None]:
        if isinstance(self.feed_forward, MoELayer):
            return self.feed_forward(tokens_BCND, state, record=record)
        return self.feed_forward(tokens_BCND), None, state

    def _attend(self, tokens_BCND: Tensor, may_see_X11N: Tensor | None) -> Tensor:
        projected = self.query_key_value(tokens_BCND.flatten(0, 1))
        heads_3XHNd = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads_3XHNd
        attended_XHNd = F.scaled_dot_product_attention(query, key, value, attn_mask=may_see_X11N)
        attended_XND = attended_XHNd.transpose(1, 2).flatten(2)
        return self.output(attended_XND).unflatten(0, tokens_BCND.shape[:2])
