"""The head that predicts quantiles of each point of the patch after a token.

Shapes: B windows, C variates, N patches, P points of the predicted patch, K values per point,
D model width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.config import Section


@dataclass(frozen=True, kw_only=True)
class QuantileHeadConfig(Section):
    """Several quantiles per point, learned by pinball loss.

    Ours: point forecasts cannot be scored by CRPS-like measures, where quantile models lead.
    """

    type: Literal["quantile"] = "quantile"
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Ascending, each between 0 and 1; 0.5 must be there, it is the point forecast."""

    def __post_init__(self) -> None:
        levels = self.levels
        is_ascending = all(a < b for a, b in itertools.pairwise(levels))
        if not is_ascending or not all(0 < level < 1 for level in levels) or 0.5 not in levels:
            raise ValueError(
                f"levels {list(levels)} must ascend, lie between 0 and 1, and hold 0.5"
            )


class QuantileHead(nn.Module):
    """Linear map from a token to quantiles of the points of the next patch."""

    error_power = 1
    levels_K: Tensor

    def __init__(self, config: QuantileHeadConfig, d_model: int, patch_length: int) -> None:
        super().__init__()
        self.quantile_levels = config.levels
        self.project = nn.Linear(d_model, patch_length * len(config.levels))
        self.register_buffer("levels_K", torch.tensor(config.levels), persistent=False)

    def forward(self, tokens_BCND: Tensor) -> Tensor:
        """Return prediction_BCNPK, unsorted: sorting would bend gradients where levels cross."""
        return self.project(tokens_BCND).unflatten(-1, (-1, len(self.quantile_levels)))

    def point_errors(self, prediction_BCNPK: Tensor, target_BCNP: Tensor) -> Tensor:
        """Twice the pinball loss, mean over levels, in the unit of the target.

        Twice, so that the term of the median is the absolute error.
        """
        error_BCNPK = target_BCNP[..., None] - prediction_BCNPK.float()
        # 2 max(q e, (q - 1) e) = |e| + (2 q - 1) e; the gradient of a maximum is masks and copies.
        lean_BCNP = error_BCNPK @ (2 * self.levels_K.to(error_BCNPK.dtype) - 1)
        return (error_BCNPK.abs().sum(-1) + lean_BCNP) / len(self.levels_K)

    def point_forecast(self, prediction_BCNPK: Tensor) -> Tensor:
        """The median."""
        return prediction_BCNPK[..., self.quantile_levels.index(0.5)]
