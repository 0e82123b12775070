"""The head that predicts one value for each point of the patch after a token.

Shapes: B windows, C variates, N patches, P points of the predicted patch, K values per point,
D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tsmoe.config import Section


@dataclass(frozen=True, kw_only=True)
class PointHeadConfig(Section):
    """One value per point, learned by squared error (Time Tracker, arXiv 2505.15151)."""

    type: Literal["point"] = "point"


class PointHead(nn.Module):
    """Linear map from a token to the points of the next patch."""

    quantile_levels: tuple[float, ...] = ()
    error_power = 2

    def __init__(self, d_model: int, patch_length: int) -> None:
        super().__init__()
        self.project = nn.Linear(d_model, patch_length)

    def forward(self, tokens_BCND: Tensor) -> Tensor:
        """Return prediction_BCNPK with K = 1."""
        return self.project(tokens_BCND).unsqueeze(-1)

    def point_errors(self, prediction_BCNPK: Tensor, target_BCNP: Tensor) -> Tensor:
        """Squared error of each point, in the unit of the target squared."""
        return (prediction_BCNPK[..., 0].float() - target_BCNP).square()

    def point_forecast(self, prediction_BCNPK: Tensor) -> Tensor:
        """The expected value."""
        return prediction_BCNPK[..., 0]
