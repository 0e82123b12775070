"""What a step minimises: an objective counts its targets, then scores what the model made of them.

Shapes: B windows, C variates, N patches, P patch length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.losses import ErrorUnit, LossTerms, next_patch_loss, target_patches
from tsmoe.models.output import ModelOutput
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.spans import NO_SERIES
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class BatchCounts:
    """What is in a micro-batch; numbers, or tensors of one number on the batch's device."""

    targets: Tensor | int
    """What the loss is a mean over."""
    points: Tensor | int
    """Recorded points that are predicted, each counted once."""
    tokens: Tensor | int
    """Tokens that are of a series."""
    sequences: int
    """Windows times variates."""

    def as_tensor(self, device: torch.device) -> Tensor:
        """Return the four numbers as float64."""
        numbers = torch.zeros(4, dtype=torch.float64, device=device)
        for place, number in enumerate(vars(self).values()):
            numbers[place] += number
        return numbers


class Objective(Protocol):
    """What the models of a step are trained for."""

    def count(self, model: Any, batch: WindowBatch) -> BatchCounts:
        """Count what the loss will be a mean over, before the model sees it."""
        ...

    def loss(self, model: Any, output: Any, batch: WindowBatch, *, ranks: Ranks) -> LossTerms:
        """Score the model's output. Collective, as some losses look at all ranks' outputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class NextPatchObjective:
    """Every token predicts the patch after it (Time Tracker); see `next_patch_loss`."""

    error_unit: ErrorUnit
    target_clip: float

    def count(self, model: TimeTracker, batch: WindowBatch) -> BatchCounts:
        """Count targets; where patches overlap, a point is the target of several tokens."""
        _, is_target_BCNP = _targets(model, batch)
        after_first_patch = slice(model.config.patch_length, None)
        num_tokens: Tensor | int = is_target_BCNP.shape[:3].numel()
        if batch.series_BCN is not None:
            num_tokens = (batch.series_BCN != NO_SERIES).sum()
        return BatchCounts(
            targets=is_target_BCNP.sum(),
            points=batch.is_target_BCL[..., after_first_patch].sum(),
            tokens=num_tokens,
            sequences=is_target_BCNP.shape[:2].numel(),
        )

    def loss(
        self,
        model: TimeTracker,
        output: ModelOutput,
        batch: WindowBatch,
        *,
        ranks: Ranks,  # noqa: ARG002
    ) -> LossTerms:
        """Compare each token's prediction with the patch that followed."""
        return next_patch_loss(
            model.head,
            output,
            *_targets(model, batch),
            error_unit=self.error_unit,
            target_clip=self.target_clip,
        )


def _targets(model: TimeTracker, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    config = model.config
    return target_patches(batch, patch_length=config.patch_length, patch_stride=config.patch_stride)
