"""Floating-point operations of a training step, counted from the configuration alone.

Matrix products only, a multiply-add as 2, as is usual for model FLOP/s utilisation (MFU). What is
left out (norms, softmax, rotary embedding, gates, sorting) moves memory and multiplies little.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsmoe.models.patch_moe import PatchMoEConfig
    from tsmoe.models.time_tracker import TimeTrackerConfig


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Operations of forward and backward pass, by part."""

    attention: int
    """Scores and weighted sums; only what a query may look at: the causal half."""
    projections: int
    """Query, key, value and output of attention."""
    routed_experts: int
    """`top_k` experts for every token, neither fewer (nothing is dropped) nor more."""
    shared_experts: int
    """Shared experts, or the dense feed-forward network: what every token passes."""
    router: int
    embedding: int
    head: int

    @property
    def total(self) -> int:
        """Operations of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def training_flops(
    model: TimeTrackerConfig,
    *,
    windows: int,
    variates: int = 1,
    context_length: int | None = None,
    recomputes: bool = False,
    attended_variates: float | None = None,
) -> FlopCount:
    """Count forward and backward pass over some windows.

    The backward pass of a matrix product is two of its size, but for the embedding, whose input
    needs no gradient. Kernels that compute attention scores again in the backward pass do half as
    much again; like any recomputation by a kernel that is not counted.

    Args:
        model: sizes.
        windows: of a micro-batch, or of all micro-batches of all ranks: the count is linear.
        variates: of each window.
        context_length: points of each window that the model sees; None: the model's.
        recomputes: whether the blocks' forward pass runs again in the backward pass (activation
            checkpointing). MFU leaves that out, the hardware's utilisation does not.
        attended_variates: mean number of variates that a variate looks at, itself among them; None:
            all, the dense graph.
    """
    from tsmoe.models.block import DenseConfig
    from tsmoe.nn.patch import num_patches

    patches = num_patches(
        context_length or model.context_length,
        patch_length=model.patch_length,
        patch_stride=model.patch_stride,
    )
    series = windows * variates
    tokens = series * patches
    seen = variates if attended_variates is None else attended_variates
    pairs = round(series * seen * (patches * (patches + 1) // 2))
    width, feed_forward = model.d_model, model.feed_forward
    if isinstance(feed_forward, DenseConfig):
        routed_width, shared_width, num_experts = 0, feed_forward.d_ff, 0
    else:
        routed_width = feed_forward.router.top_k * feed_forward.d_ff_expert
        shared_width = feed_forward.num_shared_experts * feed_forward.d_ff_shared
        num_experts = feed_forward.num_experts
    head = 3 * width * model.patch_length * values_per_point(model)
    if model.linear_shortcut:  # what it sees needs no gradient
        head += 2 * model.context_length * model.lookahead_patches * model.patch_length
    # One forward pass, and two of its size backward; one more where blocks are recomputed.
    in_blocks = (4 if recomputes else 3) * 2 * model.num_layers
    return FlopCount(
        attention=in_blocks * pairs * 2 * width,
        projections=in_blocks * tokens * 4 * width**2,
        routed_experts=in_blocks * tokens * 3 * width * routed_width,
        shared_experts=in_blocks * tokens * 3 * width * shared_width,
        router=in_blocks * tokens * width * num_experts,
        embedding=2 * 2 * tokens * 2 * model.patch_length * width,
        head=2 * tokens * head,
    )


def encoder_flops(model: PatchMoEConfig, *, sequences: int) -> FlopCount:
    """Count forward and backward pass of PatchMoE over some univariate sequences.

    The head counts as one that forecasts, where there is one, else as one that reconstructs; that
    of classes multiplies little. Routers compute twice forward while training, once for a loss that
    is theirs alone.

    Args:
        model: sizes.
        sequences: windows times variates.
    """
    from tsmoe.models.block import DenseConfig

    patches, width, feed_forward = model.num_patches, model.d_model, model.feed_forward
    tokens = sequences * patches
    routed_width = shared_width = per_token = 0
    if isinstance(feed_forward, DenseConfig):
        shared_width = feed_forward.d_ff
    else:
        router = feed_forward.router
        routed_width = router.top_k * feed_forward.d_ff_expert
        shared_width = feed_forward.num_shared_experts * feed_forward.d_ff_shared
        per_token = 2 * width * feed_forward.num_experts
        if router.type == "recurrent":
            memory = router.d_router
            scores = feed_forward.num_experts * (2 if router.noise else 1)
            per_token = 2 * memory * (width + 6 * memory + scores)
    in_blocks = 3 * 2 * model.num_layers
    per_sequence = 3 * patches * width * model.patch_length
    ahead = [head for head in model.heads.values() if head.type == "forecast"]
    if ahead:
        # Tokens have a gradient, the window of a shortcut has none, and one that rests has none.
        passes = {None: 0, "from_mean": 2, "from_last": 2, "least_squares": 1}
        per_sequence = max(
            head.prediction_length
            * (3 * patches * width + passes[head.shortcut] * model.context_length)
            for head in ahead
        )
    return FlopCount(
        attention=in_blocks * sequences * patches**2 * 2 * width,
        projections=in_blocks * tokens * 4 * width**2,
        routed_experts=in_blocks * tokens * 3 * width * routed_width,
        shared_experts=in_blocks * tokens * 3 * width * shared_width,
        router=in_blocks * tokens * per_token,
        embedding=2 * 2 * tokens * 2 * model.patch_length * width,
        head=2 * sequences * per_sequence,
    )


def values_per_point(model: TimeTrackerConfig) -> int:
    """Count what the head predicts for each point: 1, or the quantile levels."""
    from tsmoe.heads import QuantileHeadConfig

    return len(model.head.levels) if isinstance(model.head, QuantileHeadConfig) else 1
