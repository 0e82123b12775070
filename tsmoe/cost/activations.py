"""Bytes that each module keeps for the backward pass, read off its code.

One function a module, and a test for each that compares it with what autograd really saves. Who
makes a tensor counts it; a norm counts the residual stream that goes into it, and its output, which
several modules read.

Letters: T tokens of the micro-batch, U units that a router decides for (tokens or series), R rows
sent to experts (T times `top_k`), D model width, F feed-forward width, E routed experts, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsmoe.cost.flops import values_per_point

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig
    from tsmoe.moe.layer import MoEConfig
    from tsmoe.moe.routers import RouterConfig

_FLOAT32, _INT64 = 4, 8
# Of nn/causal_attention.py.
_FEW_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """In which precision a rank computes, and what its kernels keep."""

    element: int = _FLOAT32
    """Bytes of an activation."""
    is_autocast: bool = False
    """Weights are float32 and cast before each use: the plain engine's bf16."""
    is_on_gpu: bool = False

    @property
    def weight(self) -> int:
        """Bytes of a weight of the model, and of its gradient."""
        return _FLOAT32 if self.is_autocast else self.element


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sizes of one rank's micro-batch, as its modules see them."""

    windows: int
    series: int
    """Windows times variates."""
    patches: int
    """Tokens of a series."""
    top_k: int = 0
    """Experts per token; 0 in a dense model."""
    is_remote: bool = False
    """Whether experts are spread over ranks, so that rows travel."""
    is_grouped: bool = False
    """Whether all experts are one grouped product, which takes its rows in order of expert."""
    imbalance: float = 1.0
    """Rows that the fullest rank of an expert-parallel group receives, over the mean."""

    @property
    def tokens(self) -> int:
        """T, tokens of the micro-batch."""
        return self.series * self.patches

    @property
    def sent(self) -> int:
        """R, rows that this rank sends to experts."""
        return self.tokens * self.top_k

    @property
    def received(self) -> int:
        """Rows that this rank's experts get."""
        return round(self.sent * self.imbalance)


def norm_bytes(model: TimeTrackerConfig, rows: Rows, numerics: Numerics) -> int:
    """RMS norm: its input, its output, and one factor a token."""
    return rows.tokens * (2 * model.d_model * numerics.element + _FLOAT32)


def attention_bytes(model: TimeTrackerConfig, rows: Rows, numerics: Numerics) -> int:
    """Attention of each variate to itself: query, key, value, the output, and weights or sums.

    On a processor also the projection's matrix, with rows in the order that rotation wants; with
    autocast it is cast anyway.
    """
    size = rows.tokens * 4 * model.d_model * numerics.element
    if not numerics.is_on_gpu and not numerics.is_autocast:
        size += 3 * model.d_model**2 * numerics.element
    if numerics.is_on_gpu or rows.patches > _FEW_TOKENS:
        return size + rows.tokens * model.num_heads * _FLOAT32
    # The processor's path for few tokens holds all weights.
    return size + rows.tokens * rows.patches * model.num_heads * numerics.element


def decides_by(router: RouterConfig) -> str:
    """Return what a decision is made for: `sequence`, `prefix` or `token`."""
    return router.mode if router.type == "sequence" else "token"


def memory_floats(router: RouterConfig) -> int:
    """Count what a recurrent router keeps of a token: of both tracks gates, input and state.

    An estimate: it was not measured as the other parts were.
    """
    return 2 * 6 * router.d_router if router.type == "recurrent" else 0


def router_bytes(
    model: TimeTrackerConfig, config: MoEConfig, rows: Rows, numerics: Numerics
) -> int:
    """Router: tokens in float32, affinities, what was chosen; scores live on in the routing."""
    router = config.router
    per_token = config.num_experts * _FLOAT32
    if numerics.element != _FLOAT32:
        per_token += model.d_model * _FLOAT32
    units = rows.series if decides_by(router) == "sequence" else rows.tokens
    per_token += memory_floats(router) * _FLOAT32
    # Of those that were chosen and the next best, ids; of the chosen ones weights.
    per_unit = min(router.top_k + 1, config.num_experts) * _INT64 + router.top_k * _FLOAT32
    if router.top_k > 1:
        per_unit += _FLOAT32 + router.top_k * _FLOAT32
    if decides_by(router) in ("sequence", "prefix"):
        per_unit += config.num_experts * _FLOAT32
    return rows.tokens * per_token + units * per_unit


def dispatch_bytes(
    model: TimeTrackerConfig, config: MoEConfig, rows: Rows, numerics: Numerics
) -> int:
    """Dispatch: rows that came from other ranks or were put in order, weights, and the order."""
    units = rows.series if decides_by(config.router) == "sequence" else rows.tokens
    choices = units * config.router.top_k
    arrived = round(choices * rows.imbalance) if rows.is_remote else 0
    size = (
        choices * _INT64 * (1 if config.router.top_k == 1 else 2)
    )  # the order, by choice and unit
    if rows.is_remote or rows.is_grouped:
        size += choices * _INT64  # the way back
        size += rows.received * model.d_model * numerics.element
    size += arrived * (_INT64 + _FLOAT32)
    if rows.is_grouped:
        size += rows.received * _FLOAT32 + arrived * _INT64
    return size


def experts_bytes(config: MoEConfig, rows: Rows, numerics: Numerics) -> int:
    """Routed experts: gate and up alone."""
    return rows.received * 2 * config.d_ff_expert * numerics.element


def feed_forward_bytes(d_ff: int, rows: Rows, numerics: Numerics) -> int:
    """Shared or dense feed-forward: gate and up, and their product."""
    return rows.tokens * 3 * d_ff * numerics.element


def embedding_bytes(model: TimeTrackerConfig, rows: Rows, numerics: Numerics) -> int:
    """Embedding: patches and which of their points are missing."""
    return rows.tokens * 2 * model.patch_length * numerics.element


def head_bytes(model: TimeTrackerConfig, rows: Rows, numerics: Numerics) -> int:
    """Head: the prediction, which the step holds to its end, and what a shortcut sees."""
    seen = model.context_length if model.linear_shortcut else 0
    predicted = model.patch_length * values_per_point(model)
    return rows.tokens * (predicted + seen) * numerics.element


def loss_bytes(model: TimeTrackerConfig, rows: Rows) -> int:
    """Loss: the error of each value that is predicted, and which points count."""
    points, levels = rows.tokens * model.patch_length, values_per_point(model)
    return points * (_FLOAT32 * levels + 1)


def batch_bytes(model: TimeTrackerConfig, rows: Rows) -> int:
    """Batch: values, which are observed and which are targets."""
    return rows.series * model.window_length * (_FLOAT32 + 1 + 1)
