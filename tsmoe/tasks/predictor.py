"""What a trained PatchMoE says of windows, with plain torch: no DeepSpeed, no ranks.

Shapes: B windows, C variates, L context steps, Q prediction steps, Y classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tsmoe.checkpoint.package import load_package
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.inference import Forecast, Forecaster, choose_device
from tsmoe.models.patch_moe import PatchMoE
from tsmoe.nn.matmul import exact_onednn_matmul

Floats = NDArray[np.float32]


class TaskPredictor:
    """Passes windows through a model, batch by batch."""

    def __init__(
        self, model: PatchMoE, card: dict[str, Any], device: torch.device, *, batch_size: int = 256
    ) -> None:
        """Take a model.

        Args:
            model: on any device.
            card: of its package, or empty.
            device: to compute on.
            batch_size: univariate sequences that pass the model together, at least.
        """
        self.model = model.to(device).eval()
        self.card = card
        self.device = device
        self.batch_size = batch_size
        self.context_length = model.config.context_length

    def task(self, kind: str) -> str:
        """Return the name of the model's task of a kind, such as `anomaly`, or of that name.

        Raises:
            ConfigError: if it has none, or several.
        """
        of_card = self.card.get("tasks", {})
        if kind in self.model.tasks:
            return kind
        names = [name for name in self.model.tasks if of_card.get(name, {}).get("type") == kind]
        if len(names) != 1:
            there = {name: of_card.get(name, {}).get("type") for name in self.model.tasks}
            found = f"{len(names)} tasks" if names else "no task"
            raise ConfigError(
                f"the package has {found} of the kind or name {kind}; there are "
                f"{', '.join(f'{name} ({its_kind})' for name, its_kind in there.items())}; "
                "give one of these names"
            )
        return names[0]

    @torch.inference_mode()
    def predict(
        self, values_BCL: Floats, task: str, *, shown_BCL: NDArray[np.bool_] | None = None
    ) -> Floats:
        """Return points_BCL, forecast_BCQ or logits_BY, whatever the task gives.

        Args:
            values_BCL: L the context length of the model; NaN where not observed.
            task: name of it.
            shown_BCL: what the model may see of what is observed; None: all.
        """
        observed_BCL = np.isfinite(values_BCL)
        values_BCL = np.where(observed_BCL, values_BCL, 0).astype(np.float32)
        if shown_BCL is not None:
            observed_BCL = observed_BCL & shown_BCL
        per_pass = max(1, self.batch_size // max(1, values_BCL.shape[1]))
        pieces = []
        for first in range(0, len(values_BCL), per_pass):
            piece = slice(first, first + per_pass)
            with exact_onednn_matmul(self.device):
                output = self.model(
                    torch.from_numpy(values_BCL[piece]).to(self.device),
                    torch.from_numpy(observed_BCL[piece]).to(self.device),
                    task,
                )
            pieces.append(output.prediction.cpu().numpy())
        return np.concatenate(pieces)


class TaskForecaster:
    """Lets a PatchMoE forecast wherever a `Forecaster` may: evaluation and the command line."""

    quantile_levels: tuple[float, ...] = ()
    mixes_variates = False

    def __init__(self, predictor: TaskPredictor, task: str, *, standardises: bool = False) -> None:
        """Take a task of a model.

        Args:
            predictor: of the model.
            task: one that forecasts.
            standardises: whether contexts come in any unit, and are brought to the one that the
                model was trained in by their own mean and deviation.
        """
        if standardises and not predictor.model.config.normalises_windows:
            raise ConfigError(
                "the package was trained with model.normalises_windows=false, so it forecasts in "
                "the scaled unit of its own table alone; evaluate it there, or train with true"
            )
        self.predictor, self.task, self.standardises = predictor, task, standardises
        self.card = predictor.card
        self.context_length = predictor.context_length
        head = predictor.model.config.heads[task]
        assert head.type == "forecast"
        self.prediction_length = head.prediction_length

    def forecast(self, context_CL: Floats, prediction_length: int) -> Forecast:
        """Forecast one window; see `forecast_batch`."""
        return self.forecast_batch(np.asarray(context_CL)[None], prediction_length)

    def forecast_batch(
        self,
        context_BCL: Floats,
        prediction_length: int,
        *,
        batch_size: int = 256,  # noqa: ARG002
        num_covariates: int = 0,
        future_BFQ: Floats | None = None,  # noqa: ARG002
    ) -> Forecast:
        """Forecast what follows each context; longer horizons than the head's are rolled.

        Args:
            context_BCL: in any unit; NaN where not observed. The last points are used; what is
                missing of a context is not observed.
            prediction_length: steps to forecast, at least 1.
            batch_size: not heeded: the predictor has one.
            num_covariates: last variates, which are left out.
            future_BFQ: of covariates; not heeded.

        Raises:
            ConfigError: if `prediction_length` is below 1 or a value is infinite.
        """
        if prediction_length < 1:
            raise ConfigError(f"prediction_length is {prediction_length}; it must be at least 1")
        context_BCL = np.asarray(context_BCL, np.float32)
        if context_BCL.ndim != 3 or 0 in context_BCL.shape:
            raise ConfigError(
                f"the context has shape {context_BCL.shape}; expected windows x variates x points"
            )
        if np.isinf(context_BCL).any():
            raise ConfigError("the context holds infinite values; mark them as missing (NaN)")
        context_BCL = context_BCL[:, : context_BCL.shape[1] - num_covariates]
        loc_BC1: Floats | float = 0.0
        scale_BC1: Floats | float = 1.0
        if self.standardises:
            loc_BC1, scale_BC1 = _own_scale(context_BCL[..., -self.context_length :])
            context_BCL = ((context_BCL - loc_BC1) / scale_BC1).astype(np.float32)
        pieces: list[Floats] = []
        length = 0
        while length < prediction_length:
            window_BCL = fit_length(context_BCL, self.context_length)
            piece_BCQ = self.predictor.predict(window_BCL, self.task)
            pieces.append(piece_BCQ)
            length += piece_BCQ.shape[-1]
            context_BCL = np.concatenate((window_BCL, piece_BCQ), axis=-1)
        mean_BCQ = np.concatenate(pieces, axis=-1)[..., :prediction_length]
        mean_BCQ = (mean_BCQ * scale_BC1 + loc_BC1).astype(np.float32)
        return Forecast(mean_BCQ=mean_BCQ, quantiles_BCQK=None)


def _own_scale(context_BCL: Floats) -> tuple[Floats, Floats]:
    """Return mean and deviation of what is observed; 0 and 1 where nothing is, or all is equal."""
    is_seen_BCL = np.isfinite(context_BCL)
    exact_BCL = np.where(is_seen_BCL, context_BCL, 0).astype(np.float64)
    count_BC1 = np.maximum(is_seen_BCL.sum(-1, keepdims=True), 1)
    loc_BC1 = exact_BCL.sum(-1, keepdims=True) / count_BC1
    centred_BCL = np.where(is_seen_BCL, exact_BCL - loc_BC1, 0)
    scale_BC1 = np.sqrt(np.square(centred_BCL).sum(-1, keepdims=True) / count_BC1)
    return loc_BC1, np.where(scale_BC1 > 0, scale_BC1, 1.0)


def open_package(
    path: str | Path, *, device: str = "auto", batch_size: int = 256
) -> Forecaster | TaskPredictor:
    """Load a package of any model; `batch_size` is that of a predictor.

    Raises:
        CheckpointError: if it is missing or damaged.
        ConfigError: if the device is not there.
    """
    chosen = choose_device(device)
    model, card = load_package(Path(path))
    if not isinstance(model, PatchMoE):
        return Forecaster(model, card, chosen)
    return TaskPredictor(model, card, chosen, batch_size=batch_size)


def load_forecaster(
    path: str | Path, *, device: str = "auto", task: str | None = None
) -> Forecaster | TaskForecaster:
    """Load a package of any model that forecasts; `task` names one of several that do.

    Raises:
        CheckpointError: if it is missing or damaged.
        ConfigError: if it does not forecast, or the device is not there.
    """
    predictor = open_package(path, device=device)
    if not isinstance(predictor, TaskPredictor):
        if task not in (None, "forecast"):
            raise ConfigError(f"{path}: task is {task}, but a time_tracker forecasts and no more")
        return predictor
    of_card = predictor.card.get("tasks", {})
    kinds = [kind for kind in ("forecast", "series")
             if any(card.get("type") == kind for card in of_card.values())]  # fmt: skip
    if task is None and of_card and not kinds:
        tasks = ", ".join(f"{own} ({card.get('type')})" for own, card in of_card.items())
        raise ConfigError(
            f"{path}: the package does not forecast, it has {tasks}; its answers are given by "
            "tsmoe predict"
        )
    name = predictor.task(task or (kinds[0] if kinds else "forecast"))
    if of_card.get(name, {}).get("type", "forecast") not in ("forecast", "series"):
        raise ConfigError(
            f"{path}: task {name} is of the kind {of_card[name]['type']}, which does not forecast; "
            "its answers are given by tsmoe predict"
        )
    return TaskForecaster(predictor, name, standardises=True)


def fit_length(values_BCL: Floats, length: int) -> Floats:
    """Return the last points, with NaN before them where there are too few."""
    values_BCL = values_BCL[..., -length:]
    missing = length - values_BCL.shape[-1]
    return np.pad(values_BCL, ((0, 0), (0, 0), (missing, 0)), constant_values=np.nan)


def load_predictor(
    path: str | Path, *, device: str = "auto", batch_size: int = 256
) -> TaskPredictor:
    """Load a package folder of a PatchMoE; `batch_size` is that of the predictor.

    Raises:
        CheckpointError: if it is missing, damaged or of another model.
        ConfigError: if the device is not there.
    """
    opened = open_package(path, device=device, batch_size=batch_size)
    if not isinstance(opened, TaskPredictor):
        raise CheckpointError(
            f"{path}: holds a {opened.model.config.type}, which forecasts: use tsmoe forecast, or "
            "from Python tsmoe.inference.Forecaster.load"
        )
    return opened
