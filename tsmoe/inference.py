"""Forecasts from a package, with plain torch: no DeepSpeed, no ranks.

Shapes: B windows, C variates, L context points, Q prediction steps, N patches, P patch length,
K quantile levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsmoe.checkpoint.package import load_package, save_package
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.models.time_tracker import TimeTracker

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is expected to follow each context, in the unit of the input."""

    mean_BCQ: Floats
    """The point forecast: the mean for a point head, the median for a quantile head."""
    quantiles_BCQK: Floats | None
    """One per level of the head, ascending; None for a point head."""


class Forecaster:
    """A packaged model that forecasts any number of steps.

    Horizons longer than what the model forecasts in one pass are rolled: the forecast is appended
    to the context and the oldest points dropped. Each variate is forecast by itself.
    """

    def __init__(self, model: TimeTracker, card: dict[str, Any], device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.quantile_levels: tuple[float, ...] = model.head.quantile_levels
        self.context_length: int = model.config.context_length
        self.patch_length: int = model.config.patch_length
        self._tokens_per_patch = model.config.patch_length // model.config.patch_stride

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Forecaster:
        """Load a package folder.

        Raises:
            CheckpointError: if it is missing or damaged.
            ConfigError: if the device is not there.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
            raise ConfigError(f"device {device!r} is not to be had here; use auto or cpu")
        model, card = load_package(Path(path))
        return cls(model, card, torch.device(device))

    @classmethod
    def from_pretrained(cls, name_or_path: str, *, device: str = "auto") -> Forecaster:
        """Load a package folder, or fetch a package of that name from the Hugging Face hub.

        Raises:
            CheckpointError: if it is neither a folder nor on the hub.
        """
        if Path(name_or_path).exists():
            return cls.load(name_or_path, device=device)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            folder = snapshot_download(name_or_path)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
            reason = str(error).split("\n", 1)[0]
            raise CheckpointError(
                f"{name_or_path}: no such folder, and not to be had from the hub: {reason}"
            ) from error
        return cls.load(folder, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the package to another folder."""
        card = {key: value for key, value in self.card.items() if key != "format_version"}
        save_package(Path(folder), self.model, card)

    def forecast(self, context_CL: Floats, prediction_length: int) -> Forecast:
        """Forecast one window; see `forecast_batch`."""
        return self.forecast_batch(np.asarray(context_CL)[None], prediction_length)

    @torch.inference_mode()
    def forecast_batch(
        self, context_BCL: Floats, prediction_length: int, *, batch_size: int = 256
    ) -> Forecast:
        """Forecast what follows each context.

        Args:
            context_BCL: in any unit; NaN where not observed. Of a context longer than the model's
                the last points are used. A variate without any observation is forecast as 0.
            prediction_length: steps to forecast, at least 1.
            batch_size: univariate sequences that pass the model together.

        Raises:
            ConfigError: if `prediction_length` is below 1 or the context is empty or infinite.
        """
        if prediction_length < 1:
            raise ConfigError(f"prediction_length is {prediction_length}; it must be at least 1")
        context_BCL = np.asarray(context_BCL, dtype=np.float32)
        if context_BCL.ndim != 3 or context_BCL.shape[-1] == 0:
            raise ConfigError(
                f"the context has shape {context_BCL.shape}; expected windows x variates x points"
            )
        if 0 in context_BCL.shape:
            raise ConfigError(f"the context has shape {context_BCL.shape}; nothing to forecast")
        if np.isinf(context_BCL).any():
            raise ConfigError("the context holds infinite values; mark them as missing (NaN)")
        windows, variates, _ = context_BCL.shape
        # A copy: torch takes neither mirrored arrays nor, without a warning, read-only ones.
        series_XL = torch.from_numpy(context_BCL[..., -self.context_length :].copy()).flatten(0, 1)
        pieces = [
            self._roll(piece_XL.to(self.device), prediction_length).cpu()
            for piece_XL in series_XL.split(batch_size)
        ]
        predicted_BCQK = torch.cat(pieces).unflatten(0, (windows, variates))
        if not self.quantile_levels:
            return Forecast(mean_BCQ=predicted_BCQK[..., 0].numpy(), quantiles_BCQK=None)
        median = self.quantile_levels.index(0.5)
        return Forecast(
            mean_BCQ=predicted_BCQK[..., median].numpy(), quantiles_BCQK=predicted_BCQK.numpy()
        )

    def _roll(self, series_XL: Tensor, prediction_length: int) -> Tensor:
        """Return predictions of shape (X, Q, K), as many patches at a time as the model learned."""
        predicted: list[Tensor] = []
        missing = -(-prediction_length // self.patch_length)
        while missing:
            count = min(missing, self.model.config.lookahead_patches)
            patches_XQK = self._next_patches(series_XL, count)
            predicted.append(patches_XQK)
            missing -= count
            # Rolled on by the point forecast: what quantiles of later patches miss is the
            # uncertainty of earlier ones.
            point_XQ = self.model.head.point_forecast(patches_XQK)
            series_XL = torch.cat((series_XL, point_XQ), dim=1)[:, -self.context_length :]
        return torch.cat(predicted, dim=1)[:, :prediction_length]

    def _next_patches(self, series_XL: Tensor, count: int) -> Tensor:
        """Forecast `count` patches in one pass: all but the last are a gap at the end."""
        gap = series_XL.new_full((len(series_XL), (count - 1) * self.patch_length), torch.nan)
        series_XL = torch.cat((series_XL, gap), dim=1)[:, -self.context_length :]
        observed_XL = ~series_XL.isnan()
        output = self.model(series_XL[:, None], observed_XL[:, None])
        # Tokens whose ends lie one patch apart, the last one at the end of the gap.
        tokens = slice(-1 - (count - 1) * self._tokens_per_patch, None, self._tokens_per_patch)
        statistics = output.statistics
        patches_XNPK = output.prediction_BCNPK[:, 0, tokens].float()
        patches_XNPK = patches_XNPK * statistics.scale_BCN1[:, 0, tokens, :, None]
        patches_XNPK = patches_XNPK + statistics.loc_BCN1[:, 0, tokens, :, None]
        return patches_XNPK.sort(dim=-1).values.flatten(1, 2)
