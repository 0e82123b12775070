"""Cut a window into patches and embed each as a token.

Shapes: B windows, C variates, L points, N patches, P patch length, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def num_patches(length: int, *, patch_length: int, patch_stride: int) -> int:
    """Count the patches of a window: `ceil((L - P) / S) + 1`, at least one.

    Source: Time Tracker (arXiv 2505.15151), tokenisation.
    """
    return max(0, -(-(length - patch_length) // patch_stride)) + 1


def cut_patches(points_BCL: Tensor, *, patch_length: int, patch_stride: int) -> Tensor:
    """Cut the last axis into patches whose last one ends at the last point.

    Ours: where the length does not fit, zeros (False for a mask) are put at the *left*, so that
    the last token always ends at the forecast origin; the paper's formula pads on the right.
    """
    length = points_BCL.shape[-1]
    count = num_patches(length, patch_length=patch_length, patch_stride=patch_stride)
    missing = (count - 1) * patch_stride + patch_length - length
    if missing:
        points_BCL = F.pad(points_BCL, (missing, 0))
    return points_BCL.unfold(-1, patch_length, patch_stride)


class PatchEmbedding(nn.Module):
    """Map a normalised patch to a token.

    Ours: which points are missing enters by a second linear map, so that a gap is not mistaken for
    a value at the mean; a patch without gaps is embedded as in the paper.
    """

    def __init__(self, patch_length: int, d_model: int) -> None:
        super().__init__()
        self.values = nn.Linear(patch_length, d_model)
        self.missing = nn.Linear(patch_length, d_model, bias=False)

    def forward(self, patches_BCNP: Tensor, observed_BCNP: Tensor) -> Tensor:
        """Return tokens_BCND; values that are not observed must be 0."""
        missing_BCNP = (~observed_BCNP).to(patches_BCNP.dtype)
        return self.values(patches_BCNP) + self.missing(missing_BCNP)


def patch_ends(count: int, *, patch_length: int, patch_stride: int, device: torch.device) -> Tensor:
    """Return the points up to the end of each patch, padding included; int64 of shape (N,)."""
    return torch.arange(count, device=device) * patch_stride + patch_length
