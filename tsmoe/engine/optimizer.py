"""AdamW and its parameter groups, the same for every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tsmoe.config import Section
from tsmoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101). Ours for Time Tracker: the defaults are Time-MoE's."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only: not on norms, biases, attention biases or cluster centres."""
    clip_grad_norm: float = 1.0
    """Largest L2 norm of the whole gradient."""
    lr_scales: dict[str, float] = field(default_factory=dict)
    """Multiplies `lr` for parameters with this part in their name, such as `{head: 10, experts:
    0.1}`; parts are what dots separate. The last one that fits counts."""

    def __post_init__(self) -> None:
        if not (self.lr > 0 and self.clip_grad_norm > 0 and self.weight_decay >= 0):
            raise ValueError(
                f"lr ({self.lr}) and clip_grad_norm ({self.clip_grad_norm}) must be above 0, "
                f"weight_decay ({self.weight_decay}) at least 0"
            )
        for part, scale in self.lr_scales.items():
            if not 0 < scale < math.inf:
                raise ValueError(
                    f"lr_scales.{part} ({scale}) must be above 0; what shall not learn is left out "
                    "by trains= of `tsmoe finetune`"
                )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0:
            raise ValueError(
                f"betas ({list(self.betas)}) must be at least 0 and below 1, eps ({self.eps}) "
                "above 0"
            )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split trainable parameters by weight decay and learning rate.

    Groups are named, as DeepSpeed's regrouping of experts needs names.

    Raises:
        ConfigError: if a part that is to have its own learning rate is in no parameter's name.
    """
    _check_parts(model, config)
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {(True, 1.0): [], (False, 1.0): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("clusters_ED")
            fitting = [s for part, s in config.lr_scales.items() if part in name.split(".")]
            groups.setdefault((is_matrix, fitting[-1] if fitting else 1.0), []).append(parameter)
    return [
        {
            "name": ("decayed" if is_decayed else "plain") + ("" if scale == 1 else f" x {scale}"),
            "params": parameters,
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr_scale": scale,
        }
        for (is_decayed, scale), parameters in groups.items()
        if parameters
    ]


def set_learning_rate(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of each group that `parameter_groups` made."""
    for group in groups:
        group["lr"] = lr * group["lr_scale"]


def _check_parts(model: nn.Module, config: OptimizerConfig) -> None:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
    for part in config.lr_scales:
        if not any(part in name.split(".") for name in names):
            raise ConfigError(
                f"optimizer.lr_scales.{part}: no parameter that is trained has it in its name; "
                f"there are {', '.join(parts)}"
            )
