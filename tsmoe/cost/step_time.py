"""Predict how long a step takes, from what it computes, exchanges and moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsmoe.cost.communication import Exchange, exchanges
from tsmoe.cost.engine_memory import owned_elements
from tsmoe.cost.flops import training_flops
from tsmoe.cost.layout import Layout
from tsmoe.cost.machine import Machine
from tsmoe.cost.parameters import parameter_sizes

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig

_FLOAT32 = 4
# Adam reads weight, gradient and both moments, and writes all but the gradient, in float32.
_ADAM_BYTES = 7 * _FLOAT32
# The backward pass is two of three parts of the compute time; reduction may hide behind it.
_BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by part; they follow one another."""

    compute: float
    all_to_all: float
    """Of rows and their counts, less what hides behind the shared experts."""
    reduction: float
    """Of gradients, less what hides behind the backward pass."""
    gather: float
    """Of weights: after the update, or for each layer in stage 3."""
    update: float
    hidden_reduction: float
    """What of the reduction hides behind the backward pass; no part of the step."""
    is_bound_by_launches: bool
    """Whether kernels take longer to start than to compute."""
    points_per_second: float
    """Of all ranks; points of contexts."""
    mfu: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.all_to_all + self.reduction + self.gather + self.update

    @property
    def communication_share(self) -> float:
        """Part of the step that is spent in exchange."""
        return (self.all_to_all + self.reduction + self.gather) / self.total


def predict_step(
    model: TimeTrackerConfig,
    layout: Layout,
    machine: Machine,
    *,
    variates: int = 1,
    imbalance: float = 1.0,
) -> StepTime:
    """Add up a step. Arguments as for `plan_memory`, with the machine it runs on.

    Left out: waiting for data, and ranks that are slower than the others.
    """
    if layout.expert_parallel_size == 1:
        imbalance = 1.0
    launches = machine.launch.value * model.num_layers * (4 / 3 if layout.recomputes else 1)
    computed = _computed(model, layout, variates, imbalance) / machine.flops.value
    compute = layout.accumulation_steps * max(computed, launches)
    seconds = {"all_to_all": 0.0, "all_reduce": 0.0, "reduce_scatter": 0.0, "all_gather": 0.0}
    for exchange in exchanges(model, layout, variates=variates, imbalance=imbalance):
        seconds[exchange.kind] += exchange.calls * exchange_seconds(exchange, machine)
    all_to_all = seconds["all_to_all"]
    if machine.is_gpu:
        all_to_all -= _hidden_all_to_all(model, layout, machine, variates, imbalance)
    whole_reduction = reduction = seconds["all_reduce"] + seconds["reduce_scatter"]
    if layout.overlaps_reduction or not layout.zero_stage:
        reduction = max(0.0, reduction - _BACKWARD_SHARE * compute / layout.accumulation_steps)
    parts = {
        "compute": compute,
        "all_to_all": all_to_all,
        "reduction": reduction,
        "gather": seconds["all_gather"],
        "update": _update_seconds(model, layout, machine),
    }
    windows = layout.micro_batch_size * layout.accumulation_steps * layout.world_size
    flops = training_flops(model, windows=windows, variates=variates, attended_variates=1).total
    total = sum(parts.values())
    return StepTime(
        **parts,
        hidden_reduction=whole_reduction - reduction,
        is_bound_by_launches=launches > computed,
        points_per_second=windows * variates * model.context_length / total,
        mfu=flops / layout.world_size / total / machine.peak_flops.value,
    )


def exchange_seconds(exchange: Exchange, machine: Machine) -> float:
    """Predict one call of a collective.

    Within a node it goes over the links. Between nodes a ring enters and leaves each node once, by
    the network ports of all its members there; an all-to-all sends to each rank by its own port.
    Every step of a ring, or of an all-reduce's tree, adds a hop.
    """
    latency = machine.latency.value + machine.hop.value * _further_steps(exchange)
    per_node = machine.ranks_per_node
    on_node = max(1, min(exchange.ranks, per_node // exchange.stride))
    link, network = machine.link_bandwidth.value, machine.network_bandwidth.value
    if on_node >= exchange.ranks:
        return latency + exchange.bytes_out / link
    if exchange.kind == "all_to_all":
        away = exchange.bytes_out * (exchange.ranks - on_node) / (exchange.ranks - 1)
        return latency + max(away / network, (exchange.bytes_out - away) / link)
    return latency + exchange.bytes_out / min(link, on_node * network)


def _further_steps(exchange: Exchange) -> float:
    """Count the steps of a collective beyond those between two ranks."""
    match exchange.kind:
        case "all_to_all":
            return 0.0  # each sends to each at once
        case "all_reduce":
            return 2 * math.log2(max(exchange.ranks, 2)) - 2
    return max(exchange.ranks - 2, 0)


def _hidden_all_to_all(
    model: TimeTrackerConfig, layout: Layout, machine: Machine, variates: int, imbalance: float
) -> float:
    """Seconds of exchange that pass beside the shared experts: of rows to experts, and back again.

    Forward it is the way there, backward the gradients' way back: half of what rows travel.
    """
    rows = [
        exchange
        for exchange in exchanges(model, layout, variates=variates, imbalance=imbalance)
        if exchange.what == "rows of tokens"
    ]
    if not rows:
        return 0.0
    windows = layout.micro_batch_size
    flops = training_flops(model, windows=windows, variates=variates, attended_variates=1)
    # One of three parts of the operations is the forward pass, two are the backward pass.
    forward = flops.shared_experts / 3 / model.num_layers / machine.flops.value
    one = exchange_seconds(rows[0], machine)
    passes = model.num_layers * layout.accumulation_steps
    times_forward = 2 if layout.recomputes else 1
    return passes * (times_forward * min(one, forward) + min(one, 2 * forward))


def _computed(model: TimeTrackerConfig, layout: Layout, variates: int, imbalance: float) -> float:
    """Operations of a pass on the fullest rank of a group, which keeps the others waiting."""
    flops = training_flops(
        model,
        windows=layout.micro_batch_size,
        variates=variates,
        recomputes=layout.recomputes,
        attended_variates=1,
    )
    return flops.total + (imbalance - 1) * flops.routed_experts


def _update_seconds(model: TimeTrackerConfig, layout: Layout, machine: Machine) -> float:
    sizes = parameter_sizes(model, expert_parallel_size=layout.expert_parallel_size)
    if not layout.zero_stage:
        count = sum(p.numel for p in sizes if p.is_trained)
        return _ADAM_BYTES * count / machine.memory_bandwidth.value
    count = sum(owned_elements(sizes, layout).values())
    # The partition is flattened, cast and cast back.
    weight = layout.numerics.weight
    moved = (_ADAM_BYTES + 4 * weight + 2 * _FLOAT32) * count
    if not layout.offloads_optimizer:
        return moved / machine.memory_bandwidth.value
    # Gradients go to the host, which updates, and weights come back.
    return 2 * weight * count / machine.host_bandwidth.value + (
        _ADAM_BYTES * count / machine.host_bandwidth.value
    )
