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
from tsmoe.nn.variate_graph import Graph

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
    to the context and the oldest points dropped. Each variate is forecast by itself, unless the
    model was fine-tuned with layers that mix them.
    """

    def __init__(self, model: TimeTracker, card: dict[str, Any], device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.quantile_levels: tuple[float, ...] = model.head.quantile_levels
        self.context_length: int = model.config.context_length
        self.patch_length: int = model.config.patch_length

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Forecaster:
        """Load a package folder.

        Raises:
            CheckpointError: if it is missing or damaged.
            ConfigError: if the device is not there.
        """
        chosen = choose_device(device)
        model, card = load_package(Path(path))
        if not isinstance(model, TimeTracker):
            raise CheckpointError(
                f"{path}: holds a {model.config.type} for {', '.join(model.tasks)}; load it with "
                "tsmoe.tasks.predictor.load_predictor"
            )
        return cls(model, card, chosen)

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
        self,
        context_BCL: Floats,
        prediction_length: int,
        *,
        batch_size: int = 256,
        num_covariates: int = 0,
        future_BFQ: Floats | None = None,
    ) -> Forecast:
        """Forecast what follows each context.

        Args:
            context_BCL: in any unit; NaN where not observed. Of a context longer than the model's
                the last points are used. A variate without any observation is forecast as 0.
            prediction_length: steps to forecast, at least 1.
            batch_size: univariate sequences that pass the model together.
            num_covariates: last variates of the context that are not forecast.
            future_BFQ: values in the steps to forecast of the last F covariates, NaN where not
                known; F may be 0.

        Returns:
            Forecasts of the variates that are no covariates.

        Raises:
            ConfigError: if `prediction_length` is below 1, the context is empty or infinite, or
                covariates do not fit.
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
        future = self._check_covariates(context_BCL, prediction_length, num_covariates, future_BFQ)
        num_targets = variates - num_covariates
        # A copy: torch takes neither mirrored arrays nor, without a warning, read-only ones.
        series_BCL = torch.from_numpy(context_BCL[..., -self.context_length :].copy())
        if self.mixes_variates:
            per_pass = max(1, batch_size // variates)
        else:
            series_BCL = series_BCL[:, :num_targets].flatten(0, 1).unsqueeze(1)
            future, per_pass = (
                series_BCL.new_empty(len(series_BCL), 0, prediction_length),
                batch_size,
            )
            num_covariates = 0
        rolls = [
            _Roll(self.model, piece.to(self.device), known.to(self.device), num_covariates)
            for piece, known in zip(series_BCL.split(per_pass), future.split(per_pass), strict=True)
        ]
        pieces = [roll.forecast(prediction_length).cpu() for roll in rolls]
        predicted_BCQK = torch.cat(pieces).reshape(windows, num_targets, prediction_length, -1)
        if not self.quantile_levels:
            return Forecast(mean_BCQ=predicted_BCQK[..., 0].numpy(), quantiles_BCQK=None)
        median = self.quantile_levels.index(0.5)
        return Forecast(
            mean_BCQ=predicted_BCQK[..., median].numpy(), quantiles_BCQK=predicted_BCQK.numpy()
        )

    @torch.inference_mode()
    def graph(
        self,
        context_CL: Floats,
        prediction_length: int,
        *,
        num_covariates: int = 0,
        future_FQ: Floats | None = None,
    ) -> Graph:
        """Return the graph that the first pass of a window's forecast looks along.

        Args and errors as `forecast_batch`, of one window.

        Raises:
            ConfigError: if the model treats each variate by itself.
        """
        if not self.mixes_variates or self.model.variate_graph is None:
            raise ConfigError(
                "the model has no graph: each variate is forecast by itself; fine-tune it with "
                "mixing.num_channel_mixed_layers above 0"
            )
        context_BCL = np.array(context_CL, np.float32)[None, :, -self.context_length :]
        future = self._check_covariates(
            context_BCL,
            prediction_length,
            num_covariates,
            None if future_FQ is None else np.asarray(future_FQ)[None],
        )
        series_BCL = torch.from_numpy(context_BCL).to(self.device)
        roll = _Roll(self.model, series_BCL, future.to(self.device), num_covariates)
        window_BCL = roll.window(roll.patches_of_pass(prediction_length))
        return self.model.variate_graph(window_BCL, ~window_BCL.isnan(), roll.is_covariate_BC)

    @property
    def mixes_variates(self) -> bool:
        """Whether variates see one another, so that whole windows pass the model."""
        return self.model.config.num_channel_mixed_layers > 0

    def _check_covariates(
        self,
        context_BCL: Floats,
        prediction_length: int,
        num_covariates: int,
        future_BFQ: Floats | None,
    ) -> Tensor:
        """Return the known future, with no variate where nothing is known."""
        windows, variates, _ = context_BCL.shape
        if not 0 <= num_covariates < variates:
            raise ConfigError(
                f"num_covariates is {num_covariates} for {variates} variates; at least one must be "
                "left to forecast"
            )
        if future_BFQ is None:
            return torch.empty(windows, 0, prediction_length)
        future = np.array(future_BFQ, np.float32)
        expected = (windows, prediction_length)
        if future.ndim != 3 or (future.shape[0], future.shape[2]) != expected:
            raise ConfigError(
                f"future_BFQ has shape {future.shape}; expected {windows} windows x known "
                f"covariates x {prediction_length} steps"
            )
        if future.shape[1] > num_covariates:
            raise ConfigError(
                f"future_BFQ has {future.shape[1]} variates, but num_covariates is {num_covariates}"
            )
        if future.shape[1] and not self.mixes_variates:
            raise ConfigError(
                "covariates are given, but this model forecasts each variate by itself; fine-tune "
                "it with mixing.num_channel_mixed_layers above 0"
            )
        if np.isinf(future).any():
            raise ConfigError("future_BFQ holds infinite values; mark them as missing (NaN)")
        return torch.from_numpy(future)


class _Roll:
    """Windows that pass the model again and again, a few patches further each time."""

    def __init__(
        self, model: TimeTracker, series_BCL: Tensor, future_BFQ: Tensor, num_covariates: int
    ) -> None:
        self.model, self.config = model, model.config
        self.series_BCL = series_BCL
        self.num_known = future_BFQ.shape[1]
        self.is_covariate_BC = _is_covariate(series_BCL, num_covariates)
        self.num_targets = series_BCL.shape[1] - num_covariates
        known = series_BCL[:, series_BCL.shape[1] - self.num_known :]
        # Rows of the known covariates from the first of the context to the last that is known.
        self.known_BFT = torch.cat((known, future_BFQ), dim=-1)
        self.origin = series_BCL.shape[-1]

    def forecast(self, prediction_length: int) -> Tensor:
        """Return predictions of shape (B, targets, Q, K), as many patches at a time as learned."""
        predicted: list[Tensor] = []
        missing = -(-prediction_length // self.config.patch_length)
        while missing:
            count = self.patches_of_pass(missing * self.config.patch_length)
            patches_BCQK = self._next_patches(count)
            predicted.append(patches_BCQK[:, : self.num_targets])
            missing -= count
            if not missing:
                break
            # Rolled on by the point forecast: what quantiles of later patches miss is the
            # uncertainty of earlier ones. Nothing is known of covariates, which are not forecast.
            point_BCQ = self.model.head.point_forecast(patches_BCQK)
            point_BCQ[:, self.num_targets :] = torch.nan
            self.series_BCL = torch.cat((self.series_BCL, point_BCQ), dim=-1)
            self.origin += point_BCQ.shape[-1]
        return torch.cat(predicted, dim=2)[:, :, :prediction_length]

    def patches_of_pass(self, prediction_length: int) -> int:
        """Return how many patches the next pass forecasts."""
        wanted = -(-prediction_length // self.config.patch_length)
        return min(wanted, self.config.lookahead_patches)

    def window(self, count: int) -> Tensor:
        """Lay out what forecasts `count` patches in one pass: all but the last are a gap."""
        gap = (count - 1) * self.config.patch_length
        window_BCL = torch.nn.functional.pad(self.series_BCL, (0, gap), value=torch.nan)
        window_BCL = window_BCL[..., -self.config.context_length :].clone()
        if self.num_known:
            ahead = gap + self.config.patch_length
            window_BCL[:, -self.num_known :] = self._known(window_BCL.shape[-1], ahead)
        return window_BCL

    def _next_patches(self, count: int) -> Tensor:
        """Forecast `count` patches in one pass."""
        patch_length, stride = self.config.patch_length, self.config.patch_stride
        window_BCL = self.window(count)
        output = self.model(window_BCL, ~window_BCL.isnan(), is_covariate_BC=self.is_covariate_BC)
        # Tokens whose ends lie one patch apart, the last one at the end of the gap.
        per_patch = patch_length // stride
        tokens = slice(-1 - (count - 1) * per_patch, None, per_patch)
        statistics = output.statistics
        patches_BCNPK = output.prediction_BCNPK[:, :, tokens].float()
        patches_BCNPK = patches_BCNPK * statistics.scale_BCN1[:, :, tokens, :, None]
        patches_BCNPK = patches_BCNPK + statistics.loc_BCN1[:, :, tokens, :, None]
        return patches_BCNPK.sort(dim=-1).values.flatten(2, 3)

    def _known(self, length: int, ahead: int) -> Tensor:
        """Return covariates one patch ahead of the window, whose last points may be unknown."""
        end = self.origin + ahead
        missing = max(0, end - self.known_BFT.shape[-1])
        known_BFT = torch.nn.functional.pad(self.known_BFT, (0, missing), value=torch.nan)
        return known_BFT[..., end - length : end]


def choose_device(device: str) -> torch.device:
    """Find the device of a name; `auto` prefers a GPU.

    Raises:
        ConfigError: if it is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {device!r} is not to be had here; use auto or cpu")
    return torch.device(device)


def _is_covariate(values_BCL: Tensor, num_covariates: int) -> Tensor | None:
    if not num_covariates:
        return None
    windows, variates, _ = values_BCL.shape
    place_C = torch.arange(variates, device=values_BCL.device)
    return (place_C >= variates - num_covariates).expand(windows, -1)
