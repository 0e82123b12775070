"""How a job is laid out over ranks: what memory, communication and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsmoe.cost.activations import Numerics

# DeepSpeed 0.19.8 allocates its reduction bucket whole, however small the model is.
DEFAULT_BUCKET_ELEMENTS = 500_000_000


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
    bucket_elements: int = DEFAULT_BUCKET_ELEMENTS
    """Elements of DeepSpeed's reduction bucket."""
    is_on_gpu: bool = True

    @property
    def numerics(self) -> Numerics:
        """What the layout computes with."""
        is_bf16 = self.precision == "bf16"
        return Numerics(
            element=2 if is_bf16 else 4,
            is_autocast=is_bf16 and self.zero_stage == 0,
            has_fused_norms=self.is_on_gpu,
        )

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
