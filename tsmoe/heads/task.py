"""Heads of supervised tasks: from the tokens of a window to a forecast, its points, or a class.

Shapes: B windows, C variates, N patches, P patch length, Q prediction steps, D model width,
Y classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.config import Section

Pooling = Literal["flatten", "mean_max"]
Shortcut = Literal["from_mean", "from_last", "least_squares"]


@dataclass(frozen=True, kw_only=True)
class ForecastHeadConfig(Section):
    """All steps to forecast from all tokens of a variate."""

    type: Literal["forecast"] = "forecast"
    prediction_length: int = 96
    dropout: float = 0.0
    """On the tokens, while training."""
    shortcut: Shortcut | None = None
    """Add a linear map of the window itself, so that tokens learn what departs from it. It learns
    too, and begins as the window's mean, or as its last value (where that is not observed, as the
    mean; as 0 in windows that are not normalised); or it is least squares over the training
    windows, found before the first step, and rests. Ours for PatchMoE: the global residual of TiDE
    (arXiv 2304.08424)."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionHeadConfig(Section):
    """The points of a patch from its token: for anomaly detection and imputation."""

    type: Literal["reconstruction"] = "reconstruction"


@dataclass(frozen=True, kw_only=True)
class ClassificationHeadConfig(Section):
    """A class from the tokens of all variates."""

    type: Literal["classification"] = "classification"
    num_classes: int = 2
    num_variates: int = 1
    """Variates of a window; each has weights of its own."""
    pooling: Pooling = "flatten"
    """`flatten`: all tokens side by side, so that their places count; `mean_max`: mean and maximum
    over the tokens of a variate. Ours: the maximum says what there is somewhere."""
    dropout: float = 0.1
    """On the pooled tokens, while training."""


TaskHeadConfig = ForecastHeadConfig | ReconstructionHeadConfig | ClassificationHeadConfig


class ForecastHead(nn.Module):
    """Linear map from the flattened tokens of a variate (PatchTST, arXiv 2211.14730)."""

    num_variates: int | None = None
    """Variates that windows must have; None for any."""

    def __init__(
        self, config: ForecastHeadConfig, d_model: int, num_patches: int, context_length: int
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.project = nn.Linear(num_patches * d_model, config.prediction_length)
        self.shortcut: nn.Linear | None = None
        self.begins_with_last = config.shortcut == "from_last"
        if config.shortcut is not None:
            self.shortcut = nn.Linear(context_length, config.prediction_length, bias=False)
            self.shortcut.requires_grad_(config.shortcut != "least_squares")

    def forward(self, tokens_BCND: Tensor, is_seen_BCN: Tensor, window_BCL: Tensor) -> Tensor:  # noqa: ARG002
        """Return prediction_BCQ in normalised units."""
        prediction_BCQ = self.project(self.dropout(tokens_BCND.flatten(2)))
        if self.shortcut is not None:
            prediction_BCQ = prediction_BCQ + self.shortcut(window_BCL)
        return prediction_BCQ

    def begin_with_shortcut(self) -> None:
        """Set weights such that the forecast is the window's mean, or its last value.

        What is to be least squares is the mean until it is fitted.
        """
        if self.shortcut is not None:
            for parameter in (self.project.weight, self.project.bias, self.shortcut.weight):
                nn.init.zeros_(parameter)
            if self.begins_with_last:
                nn.init.ones_(self.shortcut.weight[:, -1])


class ReconstructionHead(nn.Module):
    """Linear map from a token to the points of its own patch."""

    num_variates: int | None = None
    """Variates that windows must have; None for any."""

    def __init__(self, d_model: int, patch_length: int, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.project = nn.Linear(d_model, patch_length)

    def forward(self, tokens_BCND: Tensor, is_seen_BCN: Tensor, window_BCL: Tensor) -> Tensor:  # noqa: ARG002
        """Return points_BCL of the window in normalised units; L the context length."""
        return self.project(tokens_BCND).flatten(2)[..., -self.context_length :]


class ClassificationHead(nn.Module):
    """Linear map from the tokens of all variates, flattened or pooled.

    Tokens of patches without any observation count as 0, or not at all where they are pooled, so
    that cases may differ in length.
    """

    def __init__(self, config: ClassificationHeadConfig, d_model: int, num_patches: int) -> None:
        super().__init__()
        self.num_variates: int = config.num_variates
        self.pooling = config.pooling
        self.dropout = nn.Dropout(config.dropout)
        pooled = num_patches if config.pooling == "flatten" else 2
        self.project = nn.Linear(pooled * config.num_variates * d_model, config.num_classes)

    def forward(self, tokens_BCND: Tensor, is_seen_BCN: Tensor, window_BCL: Tensor) -> Tensor:  # noqa: ARG002
        """Return logits_BY.

        Raises:
            ValueError: if windows have another number of variates than the head.
        """
        if tokens_BCND.shape[1] != self.num_variates:
            raise ValueError(
                f"windows have {tokens_BCND.shape[1]} variates, but the classification head was "
                f"made for {self.num_variates}"
            )
        is_seen_BCN1 = is_seen_BCN[..., None]
        if self.pooling == "flatten":
            flat = torch.where(is_seen_BCN1, tokens_BCND, 0).flatten(1)
            return self.project(self.dropout(flat))
        count_BC1 = is_seen_BCN1.sum(2).clamp(min=1)
        mean_BCD = torch.where(is_seen_BCN1, tokens_BCND, 0).sum(2) / count_BC1
        most_BCD = tokens_BCND.masked_fill(~is_seen_BCN1, -torch.inf).amax(2)
        most_BCD = torch.where(is_seen_BCN.any(-1, keepdim=True), most_BCD, 0)
        pooled = torch.cat((mean_BCD, most_BCD), dim=-1).flatten(1)
        return self.project(self.dropout(pooled))


TaskHead = ForecastHead | ReconstructionHead | ClassificationHead


def build_task_head(
    config: TaskHeadConfig,
    *,
    d_model: int,
    num_patches: int,
    patch_length: int,
    context_length: int,
) -> TaskHead:
    """Build the head that a config section describes."""
    match config:
        case ForecastHeadConfig():
            return ForecastHead(config, d_model, num_patches, context_length)
        case ReconstructionHeadConfig():
            return ReconstructionHead(d_model, patch_length, context_length)
        case ClassificationHeadConfig():
            return ClassificationHead(config, d_model, num_patches)
