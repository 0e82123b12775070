"""AdamW and its parameter groups, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tsmoe.config import Section


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

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip_grad_norm <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr ({self.lr}) and clip_grad_norm ({self.clip_grad_norm}) must be above 0, "
                f"weight_decay ({self.weight_decay}) at least 0"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0:
            raise ValueError(
                f"betas ({list(self.betas)}) must be at least 0 and below 1, eps ({self.eps}) "
                "above 0"
            )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split trainable parameters into those with and without weight decay.

    Groups are named, as DeepSpeed's regrouping of experts needs names.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not name.endswith("clusters_ED")
            (decayed if is_matrix else plain).append(parameter)
    return [
        {"name": "decayed", "params": decayed, "weight_decay": config.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
    ]
