"""What PatchMoE is trained for: the error of its task, and a balance of its experts.

Shapes: B windows, C variates, L steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.losses import LossTerms
from tsmoe.models.output import TaskOutput
from tsmoe.models.patch_moe import PatchMoE
from tsmoe.moe.balance_loss import BalanceLossConfig, temporal_channel_loss
from tsmoe.ranks import Ranks
from tsmoe.tasks.config import PointLoss
from tsmoe.train.objective import BatchCounts


@dataclass(frozen=True, kw_only=True)
class TaskObjective:
    """Error of points or cross-entropy of classes, as the batch has it, and the balance loss."""

    loss_of_points: PointLoss = "mse"
    balance: BalanceLossConfig = field(default_factory=BalanceLossConfig)

    def count(self, model: PatchMoE, batch: WindowBatch) -> BatchCounts:
        """Count points or cases."""
        sequences = batch.values_BCL.shape[:2].numel()
        targets: Tensor | int = batch.num_windows
        if batch.labels_B is None:
            targets = batch.is_target_BCL.sum()
        return BatchCounts(
            targets=targets,
            points=targets,
            tokens=sequences * model.config.num_patches,
            sequences=sequences,
        )

    def loss(
        self, model: PatchMoE, output: TaskOutput, batch: WindowBatch, *, ranks: Ranks
    ) -> LossTerms:
        """Sum errors by window; while training the balance loss is added. Collective."""
        error_B, count_B = task_errors(output.prediction, batch, kind=self.loss_of_points)
        regulariser = None
        if model.training and output.routings and self.balance.is_on:
            regulariser = temporal_channel_loss(output.routings, self.balance, ranks=ranks)
        return LossTerms(error_B=error_B, count_B=count_B, regulariser=regulariser)


def validation_errors(prediction: Tensor, batch: WindowBatch) -> tuple[Tensor, Tensor]:
    """Return the sum of errors of each window that a run is stopped and chosen by, and their count.

    Of points squared errors; of classes the Brier score, the squared distance of probabilities from
    the truth: unlike cross-entropy it does not grow without end where a few cases are missed by a
    model that is sure of itself.
    """
    if batch.labels_B is None:
        return task_errors(prediction, batch, kind="mse")
    truth_BY = F.one_hot(batch.labels_B, prediction.shape[-1])
    error_B = (prediction.softmax(-1) - truth_BY).square().sum(-1)
    return error_B, torch.ones_like(batch.labels_B)


def task_errors(
    prediction: Tensor, batch: WindowBatch, *, kind: PointLoss
) -> tuple[Tensor, Tensor]:
    """Return the sum of errors of each window, and how many there are.

    Of points those of the last steps that were predicted, in the unit of the values; of classes the
    cross-entropy of the window.
    """
    if batch.labels_B is not None:
        error_B = F.cross_entropy(prediction, batch.labels_B, reduction="none")
        return error_B, torch.ones_like(batch.labels_B)
    steps = prediction.shape[-1]
    is_target_BCL = batch.is_target_BCL[..., -steps:]
    # Before the error, not only after it: what is not recorded must not reach the gradient.
    difference_BCL = torch.where(is_target_BCL, prediction - batch.values_BCL[..., -steps:], 0)
    errors_BCL = difference_BCL.square() if kind == "mse" else difference_BCL.abs()
    return errors_BCL.sum((1, 2)), is_target_BCL.sum((1, 2))
