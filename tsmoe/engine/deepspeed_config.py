"""The DeepSpeed engine's settings, and the JSON that DeepSpeed gets from them.

The run config owns batch sizes, precision, clipping, optimizer and schedule; a JSON file of the
user (see ds_configs/) may set anything else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tsmoe.config import Section
from tsmoe.errors import ConfigError

OWNED_BY_RUN_CONFIG = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "expert_parallel": "engine.expert_parallel_size",
    "managed_gradient_accumulation": "training.global_batch_size",
    "zero_force_ds_cpu_optimizer": "engine.offloads_optimizer",
    "tensorboard": "the run folder, where tensorboard files always go",
}

# Of a gradient exchange: large enough that its latency does not count. DeepSpeed would allocate
# 500 million, twice with overlap.
BUCKET_ELEMENTS = 20_000_000

_REFUSED_IN_ZERO = {
    "offload_optimizer": "set engine.offloads_optimizer instead",
    "compute_grad_norm": "the norm is in every step's report and clips the gradient",
    "zero_hpz_partition_size": "DeepSpeed 0.19.8 does not support it with experts",
    "zero_quantized_gradients": "DeepSpeed 0.19.8 does not support it with experts",
    "zero_quantized_weights": "a checkpoint would not hold what was trained",
    "zenflow": "it updates parameters late, so that a run would not be that of one process",
}
"""Keys of zero_optimization, and why; DeepSpeed accepts some of them in silence."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedEngineConfig(Section):
    """DeepSpeed with ZeRO, and experts spread over ranks."""

    type: Literal["deepspeed"] = "deepspeed"
    zero_stage: int = 1
    """1 partitions optimizer states over ranks, 2 gradients too, 3 parameters too, which are then
    gathered layer by layer; the numbers are the same."""
    offloads_optimizer: bool = False
    """Keep masters and Adam moments in host memory and update them there: less device memory, a
    slower update."""
    expert_parallel_size: int | Literal["auto"] = "auto"
    """Ranks that share one set of experts; consecutive ranks form a group. `auto`: as many as
    divide both the number of ranks and that of experts."""
    wire_precision: Literal["same", "bf16"] = "same"
    """Type in which rows, and their gradients, travel between ranks that share experts. `bf16`
    halves the bytes of fp32 rows and rounds each to 8 bits on either way. Where each rank has all
    experts nothing travels and nothing is rounded."""
    config_file: str | None = None
    """A DeepSpeed JSON with settings that the run config does not own."""

    def __post_init__(self) -> None:
        if self.zero_stage == 0:
            raise ValueError(
                "zero_stage is 0, but DeepSpeed 0.19.8 computes a wrong gradient norm for experts "
                "there (in fp32 ranks are averaged, in bf16 experts are left out), so clipping "
                "would be wrong; use 1, which costs no extra memory"
            )
        if self.zero_stage not in (1, 2, 3):
            raise ValueError(f"zero_stage is {self.zero_stage}; use 1, 2 or 3")
        if self.expert_parallel_size != "auto" and self.expert_parallel_size < 1:
            raise ValueError(
                f"expert_parallel_size ({self.expert_parallel_size}) must be at least 1"
            )


def deepspeed_json(
    config: DeepSpeedEngineConfig,
    *,
    precision: str,
    clip_grad_norm: float,
    is_on_gpu: bool,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
) -> dict[str, Any]:
    """Join the run config's settings with those of the user's JSON file.

    Raises:
        ConfigError: if the file cannot be read or sets what the run config owns.
    """
    values: dict[str, Any] = {}
    if config.config_file is not None:
        values = _read_user_json(Path(config.config_file))
    zero = values.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{config.config_file}: zero_optimization is {zero!r}, not an object")
    if zero.get("stage", config.zero_stage) != config.zero_stage:
        raise ConfigError(
            f"{config.config_file}: zero_optimization.stage is {zero['stage']} and "
            f"engine.zero_stage is {config.zero_stage}; set engine.zero_stage only"
        )
    refused = [f"{key} ({why})" for key, why in _REFUSED_IN_ZERO.items() if key in zero]
    if "offload_param" in zero and not _offloads_to_host(zero["offload_param"], config.zero_stage):
        refused.append("offload_param (only stage 3, and only with device cpu)")
    if refused:
        raise ConfigError(
            f"{config.config_file}: zero_optimization may not hold {'; '.join(refused)}"
        )
    zero["stage"] = config.zero_stage
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    if config.offloads_optimizer:
        # Page-locked memory needs a GPU's driver; there it lets copies run beside computation.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": is_on_gpu}
        # torch's AdamW updates on the host as well; DeepSpeed's own would compile for minutes.
        values["zero_force_ds_cpu_optimizer"] = False
    values |= {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": clip_grad_norm,
        # The engine raises on a gradient that is not finite instead of stepping over it.
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
    }
    values.setdefault("steps_per_print", 10**9)
    return values


def _offloads_to_host(offload_param: Any, zero_stage: int) -> bool:
    return (
        zero_stage == 3 and isinstance(offload_param, dict) and offload_param.get("device") == "cpu"
    )


def _read_user_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check engine.config_file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object at the top, got {type(values).__name__}")
    if owned := sorted(values.keys() & OWNED_BY_RUN_CONFIG.keys()):
        owners = "; ".join(f"{key}: set {OWNED_BY_RUN_CONFIG[key]}" for key in owned)
        raise ConfigError(f"{path}: {', '.join(owned)} belongs to the run config ({owners})")
    return values
