"""DeepSpeed's stages on one CUDA device, where offload moves something; skipped where none is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from small_run import Settings, one_step, small_config
from tsmoe.batch import WindowBatch
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import Ranks
from tsmoe.train.stages import prepare_pretraining

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLAIN: Settings = {"engine": {"type": "plain"}}


def staged(zero_stage: int, *, offloads: bool) -> Settings:
    return {
        "engine": {
            "type": "deepspeed",
            "zero_stage": zero_stage,
            "offloads_optimizer": offloads,
        }
    }


def trained(settings: Settings, device: torch.device) -> tuple[list[tuple[float, float]], Engine]:
    """Do three steps of one pass; return losses and gradient norms, and the engine."""
    config = small_config(Path("none"), settings)
    engine = build_engine(config, Ranks(device=device), prepare=prepare_pretraining)
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(3):
        walks_BCL = torch.randn(16, 1, config.model.window_length, generator=generator).cumsum(-1)
        is_true = torch.ones_like(walks_BCL, dtype=torch.bool).to(device)
        batch = WindowBatch(
            values_BCL=walks_BCL.to(device),
            observed_BCL=is_true,
            is_target_BCL=is_true,
            series_ids_B=torch.zeros(16, dtype=torch.int64, device=device),
        )
        report = one_step(config, engine, step, micro_batches=[batch])
        found.append((report.loss, report.grad_norm))
    return found, engine


def optimizer_devices(engine: Engine) -> set[str]:
    states = engine._zero.optimizer.state.values()  # type: ignore[attr-defined]
    return {state["exp_avg"].device.type for state in states}


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("offloads", [False, True])
def test_stage_trains_as_the_plain_engine_does(zero_stage: int, offloads: bool) -> None:
    check_stage(zero_stage, offloads=offloads, device=torch.device("cuda", 0))


def check_stage(zero_stage: int, *, offloads: bool, device: torch.device) -> None:
    """The test, which a machine without a GPU can do on its CPU."""
    expected, _ = trained(PLAIN, device)
    found, engine = trained(staged(zero_stage, offloads=offloads), device)
    for numbers, twin in zip(found, expected, strict=True):
        # Sums in another order, on a device that may split them differently each time.
        assert numbers == pytest.approx(twin, rel=1e-4)
    assert optimizer_devices(engine) == {"cpu" if offloads else device.type}
    snapshot = engine.snapshot()["dense.safetensors"]
    assert all(tensor.device.type == "cpu" for tensor in snapshot.values())
