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
from tsmoe.moe.assignment import Assignment
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.train.objective import NextPatchObjective
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
            engine,
            [batch],
            step=step,
            lr=1e-3,
            balance_rate=1e-3,
            objective=NextPatchObjective(error_unit="window", target_clip=10.0),
            series_name=str,
            telemetry=telemetry,
        )
        telemetry.step_ended(seconds=time.monotonic() - begun, seconds_waited=0.0)
    assert report.cost_before is not None
    return report.cost_before


def test_cost_of_a_step_is_measured_on_the_device() -> None:
    cost = cost_of_a_step(torch.device("cuda", 0))
    assert 0 < cost.compute_seconds_R[0] < cost.step_seconds
    assert 0 <= cost.reduce_seconds < cost.step_seconds
    assert cost.all_to_all_seconds == 0
    assert 0 < cost.memory_bytes_R[0] <= torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("counts", [[40, 0, 24, 0], [0, 0, 64, 0]])
def test_grouped_products_equal_the_loop_and_leave_idle_experts_at_zero(counts: list[int]) -> None:
    found = {}
    for compute in ("loop", "grouped"):
        experts = Experts(
            d_model=64, d_ff=32, num_experts=4, layer_index=0, num_layers=1, seed=0,
            compute=compute,
        ).to("cuda", torch.bfloat16)  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        units_UND = torch.randn(64, 1, 64, generator=generator).to("cuda", torch.bfloat16)
        units_UND.requires_grad_()
        weights_UK = torch.rand(64, 1, generator=generator).cuda().requires_grad_()
        counts_E = torch.tensor(counts, device="cuda")
        assignment = Assignment(order_M=torch.arange(64, device="cuda"), counts_E=counts_E, top_k=1)
        answers_UND = experts(units_UND, weights_UK, assignment)
        answers_UND.float().square().sum().backward()
        gradients = [p.grad for p in experts.parameters()]
        for gradient in gradients:
            is_busy = gradient.float().abs().amax((1, 2)) > 0
            assert is_busy.tolist() == [count > 0 for count in counts]
        found[compute] = [answers_UND, units_UND.grad, weights_UK.grad, *gradients]
    for loop, grouped in zip(found["loop"], found["grouped"], strict=True):
        error = (loop.float() - grouped.float()).norm() / loop.float().norm()
        assert error < 2e-2  # bf16 has 8 bits of mantissa


def test_grouped_products_with_one_rank_never_wait_for_the_device() -> None:
    tokens_BCND = torch.randn(8, 1, 8, 64, device="cuda", dtype=torch.bfloat16)
    for mode in ("sequence", "prefix", "token"):
        layer = MoELayer(
            MoEConfig(d_ff_expert=32, d_ff_shared=32, router=SequenceRouterConfig(mode=mode)),
            d_model=64, layer_index=0, num_layers=1, seed=0,
        ).to("cuda", torch.bfloat16)  # fmt: skip
        layer(tokens_BCND, None)[0].float().square().sum().backward()  # warms up
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(tokens_BCND, None)[0].float().square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
