"""The parameters of a model by size, from its configuration: nothing is built."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsmoe.cost.flops import values_per_point

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig
    from tsmoe.moe.routers import RouterConfig


@dataclass(frozen=True, kw_only=True)
class ParameterSize:
    """One parameter as a rank holds it."""

    name: str
    numel: int
    is_routed: bool = False
    """Belongs to routed experts, so that ranks of an expert-parallel group hold different parts."""
    is_decayed: bool = False
    """Which group of the optimizer it is in: those are flattened and partitioned one by one."""
    is_trained: bool = True
    """Attention biases between variates rest in channel-independent pretraining."""


@functools.cache
def parameter_sizes(
    model: TimeTrackerConfig, *, expert_parallel_size: int = 1
) -> tuple[ParameterSize, ...]:
    """List the parameters that a rank holds, in the model's order.

    Args:
        model: sizes.
        expert_parallel_size: ranks that share one set of routed experts.
    """
    width, patch = model.d_model, model.patch_length
    predicted = patch * values_per_point(model)
    sizes = [
        _matrix("embed.values.weight", width * patch),
        _vector("embed.values.bias", width),
        _matrix("embed.missing.weight", width * patch),
    ]
    for layer in range(model.num_layers):
        block = f"blocks.{layer}"
        for bias in ("same_variate_bias_H", "other_variate_bias_H"):
            name = f"{block}.attention.{bias}"
            sizes.append(ParameterSize(name=name, numel=model.num_heads, is_trained=False))
        sizes += [
            _vector(f"{block}.attention_norm.weight", width),
            _matrix(f"{block}.attention.query_key_value.weight", 3 * width**2),
            _matrix(f"{block}.attention.output.weight", width**2),
            _vector(f"{block}.feed_forward_norm.weight", width),
        ]
        sizes += _feed_forward(model, f"{block}.feed_forward", expert_parallel_size)
    sizes += [
        _vector("output_norm.weight", width),
        _matrix("head.project.weight", predicted * width),
        _vector("head.project.bias", predicted),
    ]
    if model.linear_shortcut:
        ahead = model.lookahead_patches * patch
        sizes.append(_matrix("shortcut.project.weight", ahead * model.context_length))
    return tuple(sizes)


def _feed_forward(
    model: TimeTrackerConfig, name: str, expert_parallel_size: int
) -> list[ParameterSize]:
    from tsmoe.models.block import DenseConfig

    config, width = model.feed_forward, model.d_model
    if isinstance(config, DenseConfig):
        return [
            _matrix(f"{name}.gate_up.weight", 2 * width * config.d_ff),
            _matrix(f"{name}.down.weight", width * config.d_ff),
        ]
    sizes = _router(config.router, f"{name}.router", width, config.num_experts)
    if shared := config.num_shared_experts * config.d_ff_shared:
        sizes += [
            _matrix(f"{name}.always_on.gate_up.weight", 2 * width * shared),
            _matrix(f"{name}.always_on.down.weight", width * shared),
        ]
    local = config.num_experts // expert_parallel_size
    for part, columns in (("gate_up", 2 * config.d_ff_expert), ("down", config.d_ff_expert)):
        sizes.append(
            ParameterSize(
                name=f"{name}.experts.{part}_weight", numel=local * width * columns,
                is_routed=True, is_decayed=True,
            )
        )  # fmt: skip
    return sizes


def _router(router: RouterConfig, name: str, width: int, num_experts: int) -> list[ParameterSize]:
    if router.type == "sequence":
        return [_vector(f"{name}.clusters_ED", num_experts * width)]
    scored, sizes = width, []
    if router.type == "recurrent":
        scored = memory = router.d_router
        sizes = [
            _matrix(f"{name}.project.weight", width * memory),
            _vector(f"{name}.project.bias", memory),
        ]
        if not router.shares_memory or name.startswith("blocks.0."):
            sizes += [
                _matrix(f"{name}.memory.weight_ih", 3 * memory**2),
                _matrix(f"{name}.memory.weight_hh", 3 * memory**2),
                _vector(f"{name}.memory.bias_ih", 3 * memory),
                _vector(f"{name}.memory.bias_hh", 3 * memory),
            ]
    sizes.append(_matrix(f"{name}.gate.weight", num_experts * scored))
    if router.noise:
        sizes.append(_matrix(f"{name}.spread.weight", num_experts * scored))
    return sizes


def _matrix(name: str, numel: int) -> ParameterSize:
    return ParameterSize(name=name, numel=numel, is_decayed=True)


def _vector(name: str, numel: int) -> ParameterSize:
    return ParameterSize(name=name, numel=numel)
