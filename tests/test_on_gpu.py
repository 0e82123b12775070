"""Checks that need a CUDA device; they skip themselves where there is none."""

from __future__ import annotations

import time

import pytest
import torch

from tsmoe.batch import WindowBatch
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.engine.plain_engine import PlainEngine
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.train.step import training_step
from tsmoe.train.telemetry import StepCost, StepTelemetry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_model() -> TimeTracker:
    config = TimeTrackerConfig(
        patch_length=16,
        patch_stride=16,
        context_length=128,
        d_model=64,
        num_layers=2,
        num_heads=4,
        feed_forward=MoEConfig(d_ff_expert=32, d_ff_shared=64),
    )
    return build_model(config)


def test_forward_and_gradients_equal_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    values_BCL = torch.randn(8, 1, 128).cumsum(-1)
    observed_BCL = torch.rand(8, 1, 128) > 0.1
    found = {}
    for device in ("cpu", "cuda"):
        model = small_model().to(device)
        output = model(values_BCL.to(device), observed_BCL.to(device))
        output.prediction_BCNPK.square().mean().backward()
        gradient = model.blocks[0].feed_forward.experts.gate_up_weight.grad
        found[device] = output.prediction_BCNPK.cpu(), gradient.cpu()
    # Sums in another order: a few units in the last place, over two layers.
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-4, atol=1e-5)


def test_bf16_takes_the_grouped_matmul_and_stays_near_fp32() -> None:
    torch.manual_seed(0)
    values_BCL = torch.randn(8, 1, 128, device="cuda").cumsum(-1)
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    model = small_model().cuda()
    exact = model(values_BCL, observed_BCL).prediction_BCNPK
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    rounded = model(values_BCL, observed_BCL).prediction_BCNPK.float()
    assert (rounded - exact).abs().mean() < 0.05 * exact.std()


def cost_of_a_step(device: torch.device) -> StepCost:
    """Train three steps and return what the second one cost."""
    ranks = Ranks(device=device, meter=CommunicationMeter())
    model = small_model().to(device)
    engine = PlainEngine(model, OptimizerConfig(), precision="bf16", ranks=ranks)
    telemetry = StepTelemetry(engine)
    values_BCL = torch.randn(256, 1, model.config.window_length, device=device).cumsum(-1)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    batch = WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=is_true,
        is_target_BCL=is_true,
        series_ids_B=torch.zeros(256, dtype=torch.int64, device=device),
    )
    for step in range(3):
        begun = time.monotonic()
        telemetry.step_begins()
        report = training_step(
            engine, [batch], step=step, lr=1e-3, balance_rate=1e-3, error_unit="window",
            target_clip=10.0, series_name=str, telemetry=telemetry,
        )  # fmt: skip
        telemetry.step_ended(seconds=time.monotonic() - begun, seconds_waited=0.0)
    assert report.cost_before is not None
    return report.cost_before


def test_cost_of_a_step_is_measured_on_the_device() -> None:
    cost = cost_of_a_step(torch.device("cuda", 0))
    assert 0 < cost.compute_seconds_R[0] < cost.step_seconds
    assert 0 <= cost.reduce_seconds < cost.step_seconds
    assert cost.all_to_all_seconds == 0
    assert 0 < cost.memory_bytes_R[0] <= torch.cuda.max_memory_allocated()
