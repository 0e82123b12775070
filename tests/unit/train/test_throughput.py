"""FLOP/s and MFU, against a count by hand."""

from dataclasses import replace

import pytest
import torch

from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.ranks import Ranks
from tsmoe.train import throughput as throughput_module
from tsmoe.train.step import StepReport
from tsmoe.train.throughput import Peak, find_peak, step_flops, throughput

# 4 patches of 8 points; 2 of 4 experts of width 3 for each token, one shared expert of width 5.
MODEL = TimeTrackerConfig(
    patch_length=8,
    patch_stride=8,
    context_length=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    feed_forward=MoEConfig(
        num_experts=4, d_ff_expert=3, d_ff_shared=5, router=SequenceRouterConfig(top_k=2)
    ),
)
REPORT = StepReport(
    loss=1.0,
    num_points=240,
    num_tokens=40,
    num_sequences=10,
    grad_norm=1.0,
    lr=0.1,
    load_ME=torch.ones(2, 4, dtype=torch.int64),
    margin_M=torch.zeros(2, dtype=torch.float64),
    flags=(),
    cost_before=None,
)
# Multiply-adds of one token and layer: four projections, keys and values of 1 to 4 tokens (2.5 in
# the mean), gate, up and down of 2 experts of width 3 and of 5 shared, and the router.
ROUTED = 3 * 16 * (2 * 3)
OTHER = 4 * 16 * 16 + 2.5 * 2 * 16 + 3 * 16 * 5 + 16 * 4
# Values and mask of a patch are embedded, without a gradient for them; the head gives 8 points.
EMBEDDING, HEAD = 2 * 8 * 16, 16 * 8


def by_hand(tokens: int, routed_tokens: int) -> float:
    blocks = 2 * (OTHER * tokens + ROUTED * routed_tokens)
    return 2 * (3 * blocks + 2 * EMBEDDING * tokens + 3 * HEAD * tokens)


def test_operations_of_a_step_are_those_counted_by_hand() -> None:
    assert step_flops(MODEL, REPORT) == by_hand(40, 40)


def test_fill_of_packed_windows_reaches_no_routed_expert() -> None:
    assert step_flops(MODEL, replace(REPORT, num_tokens=30)) == by_hand(40, 30)


def test_mfu_is_the_part_of_the_peak_that_was_reached() -> None:
    peak = Peak(flops_per_second=4 * by_hand(40, 40), source="by hand")
    speed = throughput(MODEL, REPORT, peak, seconds=0.5, seconds_waited=0.1)
    assert speed.mfu == pytest.approx(0.5)
    assert speed.flops_per_second == 2 * by_hand(40, 40)
    assert (speed.points_per_second, speed.tokens_per_second) == (480, 80)
    assert speed.data_wait_share == pytest.approx(0.2)


def test_unknown_peak_gives_no_mfu() -> None:
    peak = Peak(flops_per_second=None, source="no such device")
    assert throughput(MODEL, REPORT, peak, seconds=1.0, seconds_waited=0.0).mfu is None


def test_peak_of_a_processor_is_measured_once_and_counts_for_each_rank(monkeypatch) -> None:
    asked = []

    def measure(precision: str, threads: int, **settings: int) -> float:
        asked.append((precision, threads))
        return 7e9

    monkeypatch.setattr(throughput_module, "measure_gemm_rate", measure)
    peak = find_peak(Ranks(rank=0, size=3), "bf16")
    assert peak.flops_per_second == 21e9
    assert asked == [("bf16", torch.get_num_threads())]
    assert "measured" in peak.source
