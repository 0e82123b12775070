"""The loss of a batch, as sums that can be added over micro-batches and ranks.

Shapes: B windows, C variates, L points of a window, N patches, P patch length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.heads import NextPatchHead
from tsmoe.models.output import ModelOutput
from tsmoe.nn.spans import NO_SERIES

ErrorUnit = Literal["token", "window", "values"]


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Sums over the points that count, by window and by token, so that a bad one can be named."""

    error_B: Tensor
    """Sum of the point errors of each window; carries the gradient."""
    count_B: Tensor
    """Points that were summed, int64."""
    error_BCN: Tensor | None = None
    """Sum of the point errors of each token, detached; of models that tell."""
    count_BCN: Tensor | None = None
    """Points that were summed of each token, int64."""
    regulariser: Tensor | None = None
    """Scalar, this rank's share of what is added to the mean error; carries a gradient."""


def target_patches(
    batch: WindowBatch, *, patch_length: int, patch_stride: int
) -> tuple[Tensor, Tensor]:
    """Return target_BCNP and is_target_BCNP: the patch after each token of the context.

    The context is the window without its last `patch_length` points. Tokens of no series have no
    target.
    """
    after = slice(patch_length, None)
    target_BCNP = batch.values_BCL[..., after].unfold(-1, patch_length, patch_stride)
    is_target_BCNP = batch.is_target_BCL[..., after].unfold(-1, patch_length, patch_stride)
    if batch.series_BCN is not None:
        is_target_BCNP = is_target_BCNP & (batch.series_BCN != NO_SERIES)[..., None]
    return target_BCNP, is_target_BCNP


def next_patch_loss(
    head: NextPatchHead,
    output: ModelOutput,
    target_BCNP: Tensor,
    is_target_BCNP: Tensor,
    *,
    error_unit: ErrorUnit,
    target_clip: float,
) -> LossTerms:
    """Compare each token's prediction with the patch that followed.

    The arithmetic is float32 whatever the precision of the model. Tokens that have seen only a
    constant have no scale yet: their error is 0, though their points count, so that the number of
    points is known before the forward pass.

    Args:
        head: knows how a prediction is scored.
        output: of the context.
        target_BCNP: what followed, in the unit of the values.
        is_target_BCNP: True where a point counts.
        error_unit: what errors are measured in: the scale of the `token` that predicts, that of
            the whole `window` (of a packed one the part of the token's series), or the unit of the
            `values` themselves, which is that of a table's errors. Ours: a token that has seen
            little has a small scale and a large error in it; in the unit of the window all tokens
            weigh as they do in a forecast's error. Only the weight of an error knows the window, no
            input does.
        target_clip: normalised targets are clipped to this many scales. Ours: after a nearly
            constant past the scale is tiny, and one jump would outweigh the batch.
    """
    statistics = output.statistics
    normalised_BCNP = (target_BCNP - statistics.loc_BCN1) / statistics.scale_BCN1
    normalised_BCNP = normalised_BCNP.clamp(-target_clip, target_clip)
    is_measurable_BCNP = is_target_BCNP & ~statistics.is_degenerate_BCN[..., None]
    # Before the error, not only after it: 0 * NaN in the backward pass would still be NaN.
    normalised_BCNP = torch.where(is_measurable_BCNP, normalised_BCNP, 0)
    errors_BCNP = head.point_errors(output.prediction_BCNPK, normalised_BCNP)
    if error_unit == "window":
        final_BCN1 = statistics.scale_BCN1[:, :, -1:]
        if output.spans is not None:
            final_BCN1 = statistics.scale_BCN1.gather(2, output.spans.last_BCN[..., None])
        relative_BCN1 = statistics.scale_BCN1 / final_BCN1
        errors_BCNP = errors_BCNP * relative_BCN1**head.error_power
    elif error_unit == "values":
        errors_BCNP = errors_BCNP * statistics.scale_BCN1**head.error_power
    errors_BCNP = torch.where(is_measurable_BCNP, errors_BCNP, 0)
    return LossTerms(
        error_B=errors_BCNP.sum((1, 2, 3)),
        count_B=is_target_BCNP.sum((1, 2, 3)),
        error_BCN=errors_BCNP.detach().sum(-1),
        count_BCN=is_target_BCNP.sum(-1),
    )
