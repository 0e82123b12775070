"""One layer of the stack: attention, then experts or a dense feed-forward network.

Shapes: B windows, C variates, N patches, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.moe.layer import ExpertFactory, MoEConfig, MoELayer
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routing import RouterState, Routing
from tsmoe.nn.attention import AnyVariateAttention
from tsmoe.nn.feed_forward import SwiGLU
from tsmoe.nn.rms_norm import RMSNorm
from tsmoe.nn.spans import SeriesSpans


@dataclass(frozen=True, kw_only=True)
class DenseConfig(Section):
    """A dense feed-forward network: the twin that an expert layer is compared with."""

    type: Literal["dense"] = "dense"
    d_ff: int = 512
    """Width."""


FeedForwardConfig = MoEConfig | DenseConfig


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(
        self,
        *,
        d_model: int,
        num_heads: int,
        rotary_base: float,
        dropout: float,
        feed_forward: FeedForwardConfig,
        layer_index: int,
        num_layers: int,
        seed: int,
        make_experts: ExpertFactory,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(d_model)
        self.attention = AnyVariateAttention(d_model, num_heads, rotary_base=rotary_base)
        self.feed_forward_norm = RMSNorm(d_model)
        self.feed_forward: MoELayer | SwiGLU
        match feed_forward:
            case MoEConfig():
                self.feed_forward = MoELayer(
                    feed_forward,
                    d_model=d_model,
                    layer_index=layer_index,
                    num_layers=num_layers,
                    seed=seed,
                    make_experts=make_experts,
                )
            case DenseConfig():
                self.feed_forward = SwiGLU(d_model, feed_forward.d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens_BCND: Tensor,
        adjacency_BCC: Tensor | None,
        state: RouterState | None,
        *,
        spans: SeriesSpans | None = None,
        record: RoutingRecord | None = None,
    ) -> tuple[Tensor, Routing | None, RouterState | None]:
        """Return tokens, the routing (None for a dense block) and the router's state.

        `spans` keep the series of a packed window apart; a `record` is for passes that will be
        computed again, see `RoutingRecord`.
        """
        tokens_BCND, normed_BCND = self.attend(tokens_BCND, adjacency_BCC, spans)
        routing = None
        if isinstance(self.feed_forward, MoELayer):
            hidden_BCND, routing, state = self.feed_forward(
                normed_BCND, state, spans=spans, record=record
            )
        else:
            hidden_BCND = self.feed_forward(normed_BCND)
        return tokens_BCND + self.dropout(hidden_BCND), routing, state

    def attend(
        self, tokens_BCND: Tensor, adjacency_BCC: Tensor | None, spans: SeriesSpans | None
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream after attention, and its norm for the feed-forward part."""
        attended_BCND = self.attention(self.attention_norm(tokens_BCND), adjacency_BCC, spans)
        tokens_BCND = tokens_BCND + self.dropout(attended_BCND)
        return tokens_BCND, self.feed_forward_norm(tokens_BCND)
