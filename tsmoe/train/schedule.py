"""Learning rate and balance rate as functions of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tsmoe.config import Section


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """Linear warm-up, then half a cosine."""

    warmup_share: float = 0.05
    """Part of all steps in which the learning rate rises."""
    final_lr_share: float = 0.05
    """Learning rate of the last step as a part of the peak."""

    def __post_init__(self) -> None:
        if not (0 <= self.warmup_share < 1 and 0 <= self.final_lr_share <= 1):
            raise ValueError(
                f"warmup_share ({self.warmup_share}) must be at least 0 and below 1, "
                f"final_lr_share ({self.final_lr_share}) between 0 and 1"
            )


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Section):
    """How fast the routers' load bias moves (loss-free balancing, arXiv 2408.15664)."""

    rate: float = 1e-3
    """Change of an expert's bias per step; 0 turns balancing off."""
    frozen_share: float = 0.1
    """Last part of training in which the bias rests (as DeepSeek-V3, arXiv 2412.19437)."""

    def __post_init__(self) -> None:
        if self.rate < 0 or not 0 <= self.frozen_share <= 1:
            raise ValueError(
                f"rate ({self.rate}) must be at least 0, frozen_share ({self.frozen_share}) "
                "between 0 and 1"
            )


def learning_rate(step: int, *, steps: int, peak: float, config: ScheduleConfig) -> float:
    """Return the learning rate of a step, counted from 0."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def balance_rate(step: int, *, steps: int, config: BalanceConfig) -> float:
    """Return how far the bias moves after a step, counted from 0."""
    return config.rate if step < (1 - config.frozen_share) * steps else 0.0
