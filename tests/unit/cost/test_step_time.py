from dataclasses import replace

import pytest

from tsmoe.cost import training_flops
from tsmoe.cost.communication import Exchange
from tsmoe.cost.layout import Layout
from tsmoe.cost.machine import Assumption, gpu_machine
from tsmoe.cost.step_time import exchange_seconds, predict_step
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

MODEL = TimeTrackerConfig(d_model=256, num_layers=4, num_heads=4, feed_forward=MoEConfig())
_H100 = gpu_machine("h100", precision="bf16", ranks_per_node=8, network_gbps=400, tflops=100)
# Bytes alone set the time of a collective, but for its start.
MACHINE = replace(_H100, hop=Assumption(value=0.0, source="by hand"))
LAYOUT = Layout(world_size=8, zero_stage=1, precision="bf16", micro_batch_size=4096)


def exchange(kind: str, *, ranks: int, stride: int = 1) -> float:
    """Seconds of a hundred megabytes."""
    one = Exchange(kind=kind, what="", calls=1, ranks=ranks, stride=stride, bytes_out=100_000_000)
    return exchange_seconds(one, MACHINE) - MACHINE.latency.value


def test_within_a_node_the_links_set_the_time() -> None:
    expected = 1e8 / MACHINE.link_bandwidth.value
    assert exchange("all_to_all", ranks=8) == exchange("all_reduce", ranks=8) == expected


def test_between_nodes_a_ring_has_the_ports_of_all_its_members_on_a_node() -> None:
    port = MACHINE.network_bandwidth.value
    assert exchange("all_reduce", ranks=64) == pytest.approx(1e8 / min(8 * port, 315e9))
    # Each of them is alone on its node.
    assert exchange("all_reduce", ranks=8, stride=8) == pytest.approx(1e8 / port)


def test_between_nodes_an_all_to_all_has_its_own_port_only() -> None:
    port = MACHINE.network_bandwidth.value
    assert exchange("all_to_all", ranks=16) == pytest.approx(1e8 * 8 / 15 / port)


def test_a_ring_takes_longer_the_more_ranks_it_has_and_a_tree_by_their_logarithm() -> None:
    hops = replace(MACHINE, hop=Assumption(value=1e-3, source="by hand"))

    def steps(kind: str, ranks: int) -> float:
        one = Exchange(kind=kind, what="", calls=1, ranks=ranks, stride=1, bytes_out=0)
        return (exchange_seconds(one, hops) - hops.latency.value) / hops.hop.value

    assert [steps("all_gather", n) for n in (2, 8, 64)] == pytest.approx([0, 6, 62])
    assert [steps("reduce_scatter", n) for n in (2, 64)] == pytest.approx([0, 62])
    assert [steps("all_reduce", n) for n in (2, 8, 64)] == pytest.approx([0, 4, 10])
    assert steps("all_to_all", 64) == 0


def test_compute_is_the_operations_of_a_rank_over_the_rate() -> None:
    step = predict_step(MODEL, LAYOUT, MACHINE)
    flops = training_flops(MODEL, windows=4096, attended_variates=1)
    assert not step.is_bound_by_launches
    assert step.compute == pytest.approx(flops.total / 100e12)
    recomputed = predict_step(MODEL, replace(LAYOUT, recomputes=True), MACHINE)
    assert 1.2 < recomputed.compute / step.compute < 4 / 3


def test_few_windows_take_as_long_as_their_kernels_take_to_start() -> None:
    step = predict_step(MODEL, replace(LAYOUT, micro_batch_size=1), MACHINE)
    assert step.is_bound_by_launches
    assert step.compute == pytest.approx(MODEL.num_layers * MACHINE.launch.value)


def test_the_fullest_rank_keeps_the_others_waiting() -> None:
    spread = replace(LAYOUT, expert_parallel_size=8)
    even, uneven = (predict_step(MODEL, spread, MACHINE, imbalance=i) for i in (1.0, 1.5))
    assert uneven.compute > even.compute
    whole = [predict_step(MODEL, LAYOUT, MACHINE, imbalance=i).total for i in (1.0, 1.5)]
    assert whole[0] == whole[1]


def test_reduction_hides_behind_the_backward_pass_where_it_overlaps() -> None:
    here = predict_step(MODEL, LAYOUT, MACHINE)
    beside = predict_step(MODEL, replace(LAYOUT, overlaps_reduction=True), MACHINE)
    assert here.reduction > 0
    assert beside.reduction == max(0.0, here.reduction - 2 / 3 * here.compute)


def test_rows_travel_beside_the_shared_experts() -> None:
    spread = replace(LAYOUT, expert_parallel_size=8)
    idle = replace(MODEL, feed_forward=replace(MODEL.feed_forward, num_shared_experts=0))
    with_shared, without = (predict_step(m, spread, MACHINE).all_to_all for m in (MODEL, idle))
    assert without / 2 * 0.95 < with_shared < without


def test_utilisation_does_not_count_what_is_computed_again() -> None:
    free = Assumption(value=1e30, source="test")
    fast = replace(MACHINE, memory_bandwidth=free, link_bandwidth=free,
                   latency=Assumption(value=0.0, source="test"))  # fmt: skip
    step = predict_step(MODEL, LAYOUT, fast)
    assert step.mfu == pytest.approx(100e12 / fast.peak_flops.value)
    assert predict_step(MODEL, replace(LAYOUT, recomputes=True), fast).mfu < step.mfu
