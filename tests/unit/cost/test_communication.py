from dataclasses import replace

import pytest

from tsmoe.cost.communication import exchanges
from tsmoe.cost.layout import Layout
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

MODEL = TimeTrackerConfig(d_model=256, num_layers=4, num_heads=4, feed_forward=MoEConfig())
LAYOUT = Layout(
    world_size=16, expert_parallel_size=4, zero_stage=1, precision="bf16", micro_batch_size=8,
    accumulation_steps=3,
)  # fmt: skip
SIZES = parameter_sizes(MODEL, expert_parallel_size=4)


def find(layout: Layout, kind: str, what: str, **settings: float):
    found = exchanges(MODEL, layout, **settings)
    return next(e for e in found if (e.kind, e.what) == (kind, what))


def test_rows_travel_to_and_fro_in_both_passes() -> None:
    rows = find(LAYOUT, "all_to_all", "rows of tokens")
    assert rows.calls == 4 * MODEL.num_layers * 3
    # 8 windows of 30 tokens, two experts each, three of four on other ranks, 256 numbers of bf16.
    assert rows.bytes_out == 8 * 30 * 2 * 256 * 2 * 3 // 4
    assert rows.ranks == 4
    assert find(replace(LAYOUT, recomputes=True), "all_to_all", rows.what).calls == 72


def test_counts_travel_once_a_layer_and_pass() -> None:
    counts = find(LAYOUT, "all_to_all", "counts of rows")
    assert (counts.calls, counts.bytes_out) == (4 * 3, 8 * 8 * 3 // 4)


def test_rows_may_travel_in_bf16_and_unevenly() -> None:
    exact = replace(LAYOUT, precision="fp32")
    short = replace(exact, wire_precision="bf16")
    even = find(exact, "all_to_all", "rows of tokens")
    assert find(short, "all_to_all", "rows of tokens").bytes_out * 2 == even.bytes_out
    uneven = find(exact, "all_to_all", "rows of tokens", imbalance=1.25)
    assert uneven.bytes_out == pytest.approx(1.25 * even.bytes_out)


def test_gradients_of_experts_go_to_ranks_that_hold_the_same() -> None:
    dense, expert = (find(LAYOUT, "all_reduce", f"{w} gradients") for w in ("dense", "expert"))
    assert (dense.ranks, dense.stride, dense.calls) == (16, 1, 1)
    assert (expert.ranks, expert.stride) == (4, 4)
    count = sum(p.numel for p in SIZES if p.is_routed)
    assert expert.bytes_out == 2 * (2 * count * 3 // 4)


def test_stage_two_reduces_with_every_pass_and_stage_three_gathers_twice() -> None:
    assert find(replace(LAYOUT, zero_stage=2), "all_reduce", "dense gradients").calls == 3
    three = replace(LAYOUT, zero_stage=3)
    assert find(three, "reduce_scatter", "dense gradients").calls == 3
    assert find(three, "all_gather", "dense weights").calls == 6


def test_one_rank_exchanges_nothing() -> None:
    alone = Layout(world_size=1, zero_stage=1, precision="bf16")
    assert exchanges(MODEL, alone) == ()


def test_dense_model_sends_no_rows() -> None:
    dense = replace(MODEL, feed_forward=DenseConfig())
    found = exchanges(dense, replace(LAYOUT, expert_parallel_size=1))
    assert {e.kind for e in found} == {"all_reduce", "all_gather"}
