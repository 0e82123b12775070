from dataclasses import fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tsmoe.cost import FlopCount, training_flops
from tsmoe.heads import QuantileHeadConfig
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig

SMALL = TimeTrackerConfig(
    patch_length=16, patch_stride=8, context_length=160, d_model=64, num_layers=2, num_heads=2,
    feed_forward=MoEConfig(num_experts=4, d_ff_expert=48, d_ff_shared=64, compute="loop"),
)  # fmt: skip
VARIANTS = {
    "experts": SMALL,
    "sequence router": replace(
        SMALL,
        feed_forward=replace(
            SMALL.feed_forward, router=SequenceRouterConfig(mode="sequence", top_k=3)
        ),
    ),
    "dense": replace(SMALL, feed_forward=DenseConfig(d_ff=96)),
    "no shared": replace(SMALL, feed_forward=replace(SMALL.feed_forward, num_shared_experts=0)),
    "shortcut": replace(SMALL, linear_shortcut=True, lookahead_patches=2),
    "quantiles": replace(SMALL, head=QuantileHeadConfig(levels=(0.1, 0.5, 0.9))),
}


def counted(config: TimeTrackerConfig, *, recomputes: bool) -> int:
    model = build_model(config, recomputes_activations=recomputes)
    values_BCL = torch.randn(6, 1, config.context_length)
    with FlopCounterMode(display=False) as counter:
        output = model(values_BCL, torch.ones_like(values_BCL, dtype=torch.bool))
        output.prediction_BCNPK.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_count_is_that_of_torch_but_for_the_future_that_nobody_sees(name, recomputes) -> None:
    """Torch counts all pairs of tokens, the hidden half too; all else is exact."""
    count = training_flops(VARIANTS[name], windows=6, recomputes=recomputes)
    found = counted(VARIANTS[name], recomputes=recomputes)
    if recomputes:
        # Torch stops recomputing at the last tensor that is needed: the last product of a block,
        # the way back of its shared or dense part, gives none that is saved.
        config = VARIANTS[name]
        moe = config.feed_forward
        width = moe.d_ff if isinstance(moe, DenseConfig) else moe.d_ff_shared
        if isinstance(moe, DenseConfig) or moe.num_shared_experts:
            tokens = 6 * 19
            found += 2 * config.num_layers * tokens * width * config.d_model
    all_pairs = count.attention * 2 * 19 // (19 + 1)
    assert count.total - count.attention + all_pairs == found


def test_attention_counts_the_pairs_that_graph_and_time_allow() -> None:
    is_past_NN = torch.ones(19, 19).tril()
    pairs = 6 * int(torch.kron(torch.ones(3, 3), is_past_NN).sum())
    # Scores and weighted sums, forward once and backward twice, a multiply-add as 2.
    expected = SMALL.num_layers * 2 * 3 * 2 * pairs * SMALL.d_model
    assert training_flops(SMALL, windows=6, variates=3).attention == expected


def test_variates_that_nobody_looks_at_cost_no_attention() -> None:
    alone = training_flops(SMALL, windows=6, variates=4, attended_variates=1)
    assert alone.attention == training_flops(SMALL, windows=24).attention
    assert alone.attention * 4 == training_flops(SMALL, windows=6, variates=4).attention


def test_total_is_the_sum_of_parts_and_linear_in_windows() -> None:
    count = training_flops(SMALL, windows=3)
    assert count.total == sum(getattr(count, field.name) for field in fields(FlopCount))
    assert training_flops(SMALL, windows=6).total == 2 * count.total


def test_shorter_context_has_fewer_tokens() -> None:
    short = training_flops(SMALL, windows=6, context_length=80)
    full = training_flops(SMALL, windows=6)
    assert short.projections * 19 == full.projections * 9
