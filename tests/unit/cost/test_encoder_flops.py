"""Operations and parameters of PatchMoE and of routers by softmax, against torch's own counts."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tsmoe.cost import encoder_flops
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.heads.task import ForecastHeadConfig, ReconstructionHeadConfig
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.patch_moe import PatchMoEConfig
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import LinearRouterConfig, RecurrentRouterConfig

B, C = 4, 3
SMALL = PatchMoEConfig(
    patch_length=8, context_length=64, d_model=32, num_layers=2, num_heads=2, dropout=0.0,
    feed_forward=MoEConfig(num_experts=4, d_ff_expert=48, d_ff_shared=64, compute="loop",
                           router=RecurrentRouterConfig(d_router=16)),
    heads={"forecast": ForecastHeadConfig(prediction_length=24)},
)  # fmt: skip


def with_router(config, router):
    return replace(config, feed_forward=replace(config.feed_forward, router=router))


VARIANTS = {
    "recurrent": SMALL,
    "no noise": with_router(SMALL, RecurrentRouterConfig(d_router=16, noise=0.0)),
    "linear": with_router(SMALL, LinearRouterConfig()),
    "dense": replace(SMALL, feed_forward=DenseConfig(d_ff=96)),
    "norms first": replace(SMALL, norms_first=True),
    "shortcut": replace(
        SMALL, heads={"forecast": ForecastHeadConfig(prediction_length=24, shortcut="from_mean")}
    ),
    "fitted shortcut": replace(
        SMALL,
        heads={"forecast": ForecastHeadConfig(prediction_length=24, shortcut="least_squares")},
    ),
    "fills": replace(SMALL, heads={"fill": ReconstructionHeadConfig()}),
}


def counted(config: PatchMoEConfig) -> int:
    model = build_model(config).train()
    values_BCL = torch.randn(B, C, config.context_length)
    with FlopCounterMode(display=False) as counter:
        output = model(values_BCL, torch.ones_like(values_BCL, dtype=torch.bool))
        loss = output.prediction.square().mean()
        for routing in output.routings:
            loss = loss + routing.router_scores_BCNE.square().mean()
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", VARIANTS)
def test_count_is_that_of_torch(name) -> None:
    count, found = encoder_flops(VARIANTS[name], sequences=B * C), counted(VARIANTS[name])
    router = getattr(VARIANTS[name].feed_forward, "router", None)
    if isinstance(router, RecurrentRouterConfig):
        # The gradient of the first layer's empty memory, which nobody wants, is not computed.
        rows = 2 * B * C * SMALL.num_patches
        found += 2 * rows * 3 * router.d_router**2
    # Torch's counter knows no fused attention on CPU.
    assert count.total - count.attention == found


@pytest.mark.parametrize(
    "router",
    [
        LinearRouterConfig(),
        LinearRouterConfig(noise=1.0),
        RecurrentRouterConfig(d_router=8),
        RecurrentRouterConfig(d_router=8, noise=0.0, shares_memory=False),
    ],
)
def test_parameters_of_a_router_are_those_of_the_model(router) -> None:
    config = TimeTrackerConfig(
        patch_length=16, patch_stride=16, context_length=64, d_model=32, num_layers=3, num_heads=2,
        feed_forward=MoEConfig(num_experts=4, d_ff_expert=32, d_ff_shared=32, router=router),
    )  # fmt: skip
    expected = {name: p.numel() for name, p in build_model(config).named_parameters()}
    assert {size.name: size.numel for size in parameter_sizes(config)} == expected
