"""The expert layer of a block: shared experts that always run beside routed ones.

Nothing here has "expert" in the name of a router or shared parameter: DeepSpeed sorts by that word.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.moe.dispatch import run_experts
from tsmoe.moe.experts import ExpertCompute, Experts
from tsmoe.moe.plan import plan_dispatch
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routers import RouterConfig, SequenceRouterConfig, build_router
from tsmoe.moe.routing import RouterState, Routing
from tsmoe.nn.feed_forward import SwiGLU
from tsmoe.nn.spans import SeriesSpans


@dataclass(frozen=True, kw_only=True)
class MoEConfig(Section):
    """Shared and routed experts in place of the feed-forward network."""

    type: Literal["moe"] = "moe"
    num_experts: int = 8
    """Routed experts."""
    num_shared_experts: int = 1
    """Experts that every token passes."""
    d_ff_expert: int = 128
    """Width of a routed expert."""
    d_ff_shared: int = 256
    """Width of each shared expert."""
    router: RouterConfig = field(default_factory=SequenceRouterConfig)
    compute: ExpertCompute = "auto"
    """`grouped` matmul, a `loop` over experts, or `auto`: whichever the sizes and device favour."""

    def __post_init__(self) -> None:
        if self.router.top_k > self.num_experts:
            raise ValueError(
                f"router.top_k ({self.router.top_k}) must not exceed num_experts "
                f"({self.num_experts})"
            )
        if self.num_shared_experts < 0 or self.d_ff_expert < 1 or self.d_ff_shared < 1:
            raise ValueError(
                f"num_shared_experts ({self.num_shared_experts}) must not be negative; d_ff_expert "
                f"({self.d_ff_expert}) and d_ff_shared ({self.d_ff_shared}) must be at least 1"
            )

    def check_alignment(self, d_model: int) -> None:
        """Refuse sizes that grouped matmul cannot take: rows must be multiples of 16 bytes."""
        if self.compute == "grouped" and (d_model % 8 or self.d_ff_expert % 8):
            raise ValueError(
                f"compute=grouped wants d_model ({d_model}) and d_ff_expert ({self.d_ff_expert}) "
                "to be multiples of 8; use compute=auto"
            )

    @property
    def active_d_ff(self) -> int:
        """Feed-forward width that a token passes: that of the dense twin of equal active size."""
        return self.num_shared_experts * self.d_ff_shared + self.router.top_k * self.d_ff_expert


class ExpertFactory(Protocol):
    """Builds the routed experts of a layer; an engine brings its own to spread them over ranks."""

    def __call__(
        self,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        layer_index: int,
        num_layers: int,
        seed: int,
        compute: ExpertCompute,
    ) -> Experts:
        """Return the experts, or this rank's share."""
        ...


class MoELayer(nn.Module):
    """Sum of shared experts and the weighted chosen routed ones.

    Source: Time Tracker (arXiv 2505.15151), shared and private experts.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        d_model: int,
        layer_index: int,
        num_layers: int,
        seed: int,
        make_experts: ExpertFactory = Experts,
    ) -> None:
        super().__init__()
        self.router = build_router(config.router, d_model, config.num_experts)
        # Several shared experts sum to one of their joint width.
        shared_width = config.num_shared_experts * config.d_ff_shared
        self.always_on = SwiGLU(d_model, shared_width) if shared_width else None
        self.experts = make_experts(
            d_model=d_model,
            d_ff=config.d_ff_expert,
            num_experts=config.num_experts,
            layer_index=layer_index,
            num_layers=num_layers,
            seed=seed,
            compute=config.compute,
        )

    def forward(
        self,
        tokens_BCND: Tensor,
        state: RouterState | None,
        *,
        spans: SeriesSpans | None = None,
        record: RoutingRecord | None = None,
    ) -> tuple[Tensor, Routing, RouterState | None]:
        """Return the layer's output, its routing, and the router's state for the next layer.

        A `record` of an earlier pass over the same tokens replaces the decision.
        """
        record = RoutingRecord() if record is None else record
        routing, state = self.router(tokens_BCND, state, spans=spans, decision=record.decision)
        plan = record.plan
        if plan is None:
            experts = self.experts
            plan = plan_dispatch(routing, experts.ranks, layer_index=experts.layer_index)
            record.keep(routing, plan)
        always_on = self.always_on
        hidden_BCND = run_experts(
            tokens_BCND,
            routing,
            self.experts,
            plan,
            alongside=None if always_on is None else lambda: always_on(tokens_BCND),
        )
        return hidden_BCND, routing, state
