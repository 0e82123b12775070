"""Checks that need a CUDA device; they skip themselves where there is none."""

from __future__ import annotations

import pytest
import torch

from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

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
