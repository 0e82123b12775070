"""What fine-tuning starts from: a package, a run or a checkpoint of any number of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsmoe.checkpoint.elastic import expert_parameters, persistent_buffers
from tsmoe.checkpoint.package import CARD_FILE, load_package, model_from_checkpoint
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.finetune.config import FinetuneConfig, FinetuneRun
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig


@dataclass(frozen=True, kw_only=True)
class Start:
    """A model as it was before fine-tuning, whole, on the CPU."""

    model: TimeTrackerConfig
    state: dict[str, Tensor]
    """Weights and buffers by name."""
    card: dict[str, Any]
    """Of the package, or what the checkpoint says of itself."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model's config and all weights."""
        # A setting that is younger than runs which are to go on.
        model = repr(self.model).replace(", linear_shortcut=False", "")
        digest = hashlib.sha256(model.encode())
        for name, tensor in sorted(self.state.items()):
            digest.update(name.encode())
            tensor = tensor.detach().cpu().contiguous().flatten()
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def build(self) -> TimeTracker:
        """Build the start itself, every variate by itself, to see what it can do."""
        model = build_model(self.model)
        model.load_state_dict(self.state, strict=True)
        return model.eval()

    @torch.no_grad()
    def load_into(self, model: TimeTracker) -> None:
        """Copy weights into a model that may hold a share of the experts and more parameters.

        What the start does not know, such as a learned alpha, stays as it was built.
        """
        experts = expert_parameters(model)
        for name, parameter in model.named_parameters():
            if name in self.state:
                owner = experts.get(name)
                whole = self.state[name]
                parameter.copy_(whole if owner is None else whole[list(owner.global_ids)])
        for name in persistent_buffers(model):
            if name in self.state:
                model.get_buffer(name).copy_(self.state[name])


def open_start(path: str) -> Start:
    """Read a package, or the newest checkpoint of a run, or a checkpoint.

    Raises:
        CheckpointError: if it is none of these, or damaged.
    """
    folder = Path(path)
    if folder.is_file():
        raise CheckpointError(f"model={path}: a file; name the folder of the package or run")
    if (folder / CARD_FILE).exists():
        model, card = load_package(folder)
    else:
        try:
            checkpoint, meta = open_checkpoint(folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"model={path}: neither a package nor a run with a checkpoint ({error})"
            ) from error
        if "table" in meta.config:
            raise CheckpointError(
                f"model={path}: the run of another fine-tuning; start from its package, which "
                f"holds its best weights: model={checkpoint.parent.parent / 'package'}"
            )
        model = model_from_checkpoint(checkpoint, meta)
        card = {"step": meta.step, "checkpoint": str(checkpoint)}
    if not isinstance(model, TimeTracker):
        raise CheckpointError(
            f"model={path}: holds a {model.config.type}, which is trained from scratch for its "
            "tasks; start from a package of time_tracker"
        )
    return Start(model=model.config, state=model.state_dict(), card=card)


def resolve_run(config: FinetuneConfig, start: Start | None) -> FinetuneRun:
    """Find the model to train: that of the start or from scratch, with variates mixed as wanted.

    Raises:
        ConfigError: if the settings do not fit the model.
    """
    model = config.model if start is None else start.model
    assert model is not None, "checked by the config"
    if config.start is not None and Path(config.run).resolve() == Path(config.start).resolve():
        raise ConfigError(
            f"run={config.run} is the folder that training starts from; choose another run="
        )
    changes: dict[str, Any] = {}
    mixing = config.mixing
    if mixing.num_channel_mixed_layers > model.num_layers:
        raise ConfigError(
            f"mixing.num_channel_mixed_layers ({mixing.num_channel_mixed_layers}) must be at most "
            f"the {model.num_layers} layers of the model"
        )
    changes |= {
        "num_channel_mixed_layers": mixing.num_channel_mixed_layers,
        "graph": mixing.graph,
    }
    if config.dropout is not None:
        if not 0 <= config.dropout < 1:
            raise ConfigError(f"dropout ({config.dropout}) must be at least 0 and below 1")
        changes["dropout"] = config.dropout
    if config.linear_shortcut is not None:
        if start is not None and model.linear_shortcut:
            raise ConfigError(
                f"linear_shortcut is {config.linear_shortcut}, but {config.start} has one already, "
                "which goes on learning and is not fitted anew; leave the setting out"
            )
        changes["linear_shortcut"] = True
    return FinetuneRun(config=config, model=replace(model, **changes))
