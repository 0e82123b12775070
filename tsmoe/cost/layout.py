"""How a job is laid out over ranks: what memory, communication and time depend on."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from tsmoe.cost.activations import Numerics
from tsmoe.engine.deepspeed_config import (
    BUCKET_ELEMENTS,
    DeepSpeedEngineConfig,
    deepspeed_json,
)

if TYPE_CHECKING:
    from tsmoe.engine.build import RunSettings


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to spread a job over its ranks."""

    world_size: int = 1
    expert_parallel_size: int = 1
    """Ranks that share one set of routed experts."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """Of DeepSpeed; 0 is the plain engine: a whole model and optimizer on every rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    recomputes: bool = False
    """Blocks' activations are computed again in the backward pass."""
    offloads_optimizer: bool = False
    """Masters and moments live in host memory."""
    micro_batch_size: int = 64
    """Windows of one rank and one pass."""
    accumulation_steps: int = 1
    """Passes per optimizer step."""
    bucket_elements: int = BUCKET_ELEMENTS
    """Elements of DeepSpeed's reduction bucket, which it allocates whole; never more than there are
    parameters."""
    gathered_elements: int = 1_000_000_000
    """Elements of weights that stage 3 may keep gathered."""
    prefetched_elements: int = 50_000_000
    """Elements of weights that stage 3 gathers together."""
    overlaps_reduction: bool = False
    """Gradients are reduced beside the backward pass."""
    wire_precision: Literal["same", "bf16"] = "same"
    """Of rows between ranks."""
    is_on_gpu: bool = True

    @functools.cached_property
    def numerics(self) -> Numerics:
        """What the layout computes with."""
        is_bf16 = self.precision == "bf16"
        return Numerics(
            element=2 if is_bf16 else 4,
            is_autocast=is_bf16 and self.zero_stage == 0,
            is_on_gpu=self.is_on_gpu,
        )

    @property
    def wire_bytes(self) -> int:
        """Bytes of a number that is sent to another rank's experts."""
        return 2 if self.wire_precision == "bf16" else self.numerics.element

    @property
    def expert_data_parallel_size(self) -> int:
        """Ranks that hold the same routed experts, over which their optimizer is partitioned."""
        return self.world_size // self.expert_parallel_size

    def describe(self) -> str:
        """Say it in settings of a run."""
        parts = [f"data parallel {self.world_size}"]
        if self.zero_stage:
            parts = [
                f"expert parallel {self.expert_parallel_size} x {self.expert_data_parallel_size}",
                f"ZeRO {self.zero_stage}",
            ]
        parts.append(f"micro-batch {self.micro_batch_size} x {self.accumulation_steps}")
        parts += ["recompute"] if self.recomputes else []
        parts += ["offload"] if self.offloads_optimizer else []
        return ", ".join(parts)


def layout_of(config: RunSettings, world_size: int, *, is_on_gpu: bool) -> Layout:
    """Read the layout that a run's settings give on so many ranks.

    Raises:
        ConfigError: if the DeepSpeed JSON that they name cannot be read, or is refused.
    """
    training, engine = config.training, config.engine
    accumulation_steps = training.gradient_accumulation_steps(world_size)
    layout = Layout(
        world_size=world_size,
        precision=training.precision,
        recomputes=training.recomputes_activations,
        micro_batch_size=training.micro_batch_size,
        accumulation_steps=accumulation_steps,
        is_on_gpu=is_on_gpu,
    )
    if not isinstance(engine, DeepSpeedEngineConfig):
        return layout
    settings = deepspeed_json(
        engine,
        precision=training.precision,
        clip_grad_norm=config.optimizer.clip_grad_norm,
        is_on_gpu=is_on_gpu,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=accumulation_steps,
    )
    zero = settings["zero_optimization"]
    return replace(
        layout,
        expert_parallel_size=config.expert_parallel_size(world_size),
        zero_stage=zero["stage"],
        offloads_optimizer=engine.offloads_optimizer,
        bucket_elements=int(zero["reduce_bucket_size"]),
        gathered_elements=min(
            int(zero.get(f"stage3_max_{key}", 1e9)) for key in ("live_parameters", "reuse_distance")
        ),
        prefetched_elements=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        wire_precision=engine.wire_precision,
        overlaps_reduction=bool(zero.get("overlap_comm", zero["stage"] == 3)),
    )
