"""What each module keeps for the backward pass, against the storages that really stay alive."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.cost import activations as kept
from tsmoe.cost.activations import Numerics
from tsmoe.cost.layout import Layout
from tsmoe.cost.live_storages import LiveStorages
from tsmoe.cost.memory import rows_of
from tsmoe.heads import QuantileHeadConfig
from tsmoe.losses import next_patch_loss, target_patches
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.train.stages import prepare_pretraining

# Scalars, rotary tables, counts: what does not grow with the batch.
CONSTANTS = 32 * 1024
WINDOWS = 24


def moe(mode: str, *, compute: str = "loop", top_k: int = 2) -> MoEConfig:
    return MoEConfig(
        num_experts=4,
        d_ff_expert=48,
        d_ff_shared=80,
        compute=compute,
        router=SequenceRouterConfig(mode=mode, top_k=top_k),
    )


SMALL = TimeTrackerConfig(
    patch_length=16, patch_stride=16, context_length=160, d_model=64, num_layers=1, num_heads=2,
    feed_forward=moe("token"),
)  # fmt: skip
FP32, BF16 = Numerics(), Numerics(element=2)
PRECISIONS = pytest.mark.parametrize("numerics", [FP32, BF16], ids=["fp32", "bf16"])


def model_of(config: TimeTrackerConfig, numerics: Numerics) -> TimeTracker:
    model = build_model(config)
    prepare_pretraining(model)
    return model.bfloat16() if numerics is BF16 else model


def tokens_of(config: TimeTrackerConfig, numerics: Numerics) -> Tensor:
    tokens_BCND = torch.randn(WINDOWS, 1, config.context_length // 16, config.d_model)
    dtype = torch.bfloat16 if numerics is BF16 else torch.float32
    return tokens_BCND.to(dtype).requires_grad_()


def rows(config: TimeTrackerConfig, numerics: Numerics) -> kept.Rows:
    layout = Layout(
        micro_batch_size=WINDOWS, is_on_gpu=False, precision="bf16" if numerics is BF16 else "fp32"
    )
    return rows_of(config, layout, variates=1, imbalance=1.0)


def alive_after(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the bytes that a forward pass leaves alive, and its result."""
    storages = LiveStorages()
    with storages:
        result = run()
    return storages.alive(), result


def size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@PRECISIONS
def test_norm(numerics) -> None:
    norm, tokens = model_of(SMALL, numerics).blocks[0].attention_norm, tokens_of(SMALL, numerics)
    found, _output = alive_after(lambda: norm(tokens))
    predicted = kept.norm_bytes(SMALL, rows(SMALL, numerics), numerics)
    assert found + size(tokens) == pytest.approx(predicted, abs=CONSTANTS)


@PRECISIONS
@pytest.mark.parametrize("patches", [10, 130])
def test_attention(numerics, patches) -> None:
    config = replace(SMALL, context_length=16 * patches)
    attention, tokens = model_of(config, numerics).blocks[0].attention, tokens_of(config, numerics)
    found, output = alive_after(lambda: attention(tokens))
    predicted = kept.attention_bytes(config, rows(config, numerics), numerics)
    # Its output goes into the residual stream and is not kept.
    assert found - size(output) == pytest.approx(predicted, abs=CONSTANTS)


@PRECISIONS
def test_shared_feed_forward(numerics) -> None:
    shared, tokens = model_of(SMALL, numerics).blocks[0].feed_forward, tokens_of(SMALL, numerics)
    assert isinstance(shared, MoELayer)
    found, output = alive_after(lambda: shared.always_on(tokens))
    predicted = kept.feed_forward_bytes(80, rows(SMALL, numerics), numerics)
    assert found - size(output) == pytest.approx(predicted, abs=CONSTANTS)


@PRECISIONS
@pytest.mark.parametrize("compute", ["loop", "grouped"])
@pytest.mark.parametrize(("mode", "top_k"), [("token", 2), ("prefix", 3), ("sequence", 1)])
def test_expert_layer(numerics, compute, mode, top_k) -> None:
    config = replace(SMALL, feed_forward=moe(mode, compute=compute, top_k=top_k))
    layer, tokens = model_of(config, numerics).blocks[0].feed_forward, tokens_of(config, numerics)
    assert isinstance(layer, MoELayer)
    found, (output, _routing, _) = alive_after(lambda: layer(tokens, None))
    given = rows(config, numerics)
    predicted = kept.router_bytes(config, config.feed_forward, given, numerics)
    predicted += kept.dispatch_bytes(config, config.feed_forward, given, numerics)
    predicted += kept.experts_bytes(config.feed_forward, given, numerics)
    predicted += kept.feed_forward_bytes(80, given, numerics)
    # In bf16 pieces are filled up to multiples of 32 rows.
    filled = 4 * 32 * 2 * 48 * 2 if numerics is BF16 and compute == "loop" else 0
    assert found - size(output) == pytest.approx(predicted, abs=CONSTANTS + filled)


@pytest.mark.parametrize(
    "settings",
    [{}, {"head": QuantileHeadConfig(levels=(0.1, 0.5, 0.9))}, {"linear_shortcut": True}],
    ids=["point", "quantiles", "shortcut"],
)
def test_whole_model_with_its_loss(settings) -> None:
    """Also that nothing lies between the modules that nobody counts."""
    config = replace(SMALL, num_layers=3, **settings)
    model, given = model_of(config, FP32), rows(config, FP32)
    values_BCL = torch.randn(WINDOWS, 1, config.window_length)
    is_true_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    batch = WindowBatch(
        values_BCL=values_BCL, observed_BCL=is_true_BCL, is_target_BCL=is_true_BCL,
        series_ids_B=torch.zeros(WINDOWS, dtype=torch.int64),
    )  # fmt: skip

    def run() -> Any:
        output = model(values_BCL[..., :160], is_true_BCL[..., :160])
        target, is_target = target_patches(batch, patch_length=16, patch_stride=16)
        return output, next_patch_loss(
            model.head, output, target, is_target, error_unit="window", target_clip=10.0
        )

    found, _output = alive_after(run)
    assert isinstance(config.feed_forward, MoEConfig)
    block = 2 * kept.norm_bytes(config, given, FP32) + kept.attention_bytes(config, given, FP32)
    block += kept.feed_forward_bytes(80, given, FP32)
    block += kept.router_bytes(config, config.feed_forward, given, FP32)
    block += kept.dispatch_bytes(config, config.feed_forward, given, FP32)
    block += kept.experts_bytes(config.feed_forward, given, FP32)
    predicted = 3 * block + kept.embedding_bytes(config, given, FP32)
    predicted += kept.norm_bytes(config, given, FP32) + kept.head_bytes(config, given, FP32)
    predicted += kept.loss_bytes(config, given)
    # What is computed of a token's place and statistics is small beside its width.
    assert found == pytest.approx(predicted, rel=0.01, abs=CONSTANTS)
