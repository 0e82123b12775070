"""Make a package out of a checkpoint, with a card that says where it comes from."""

from __future__ import annotations

import json
import math
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from tsmoe import __version__
from tsmoe.checkpoint.elastic import expert_parameters
from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.checkpoint.package import model_from_checkpoint, save_package
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.errors import CheckpointError
from tsmoe.models import Model
from tsmoe.moe.layer import MoEConfig

_CARD_SECTIONS = ("training", "optimizer", "schedule", "balance", "data", "engine", "seed")


def export_package(checkpoint: Path, package: Path) -> dict[str, Any]:
    """Write the package of a run folder or checkpoint and return its card.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged, or the package can't be written.
    """
    folder, meta = open_checkpoint(checkpoint)
    if meta.guard is not None:
        raise CheckpointError(
            f"{folder}: a checkpoint of fine-tuning, whose package stands in "
            f"{folder.parent.parent / 'package'} when the run has ended"
        )
    model = model_from_checkpoint(folder, meta)
    card = _card(model, meta, folder)
    save_package(package, model, card)
    return card


def _card(model: Model, meta: CheckpointMeta, folder: Path) -> dict[str, Any]:
    config = meta.config
    steps = meta.step
    return {
        "made_by": f"tsmoe {__version__}",
        "made_on": datetime.now(UTC).isoformat(timespec="seconds"),
        "architecture": config["model"]["type"],
        "step": steps,
        "windows_seen": meta.windows_seen,
        "points_seen": meta.windows_seen * config["model"]["context_length"],
        "parameters": _count(model),
        "context_length": config["model"]["context_length"],
        "patch_length": config["model"]["patch_length"],
        "training_data": {
            "corpus": config["corpus"] if meta.stream is None else config["stream"],
            "fingerprint": meta.corpus_fingerprint,
        },
        **_course(folder.parent.parent / "metrics.jsonl", steps),
        "training": {section: config[section] for section in _CARD_SECTIONS},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "licence": "Apache-2.0 (weights); the training data keep their own licences",
    }


def _count(model: Model) -> dict[str, int]:
    """Count parameters, in all and those that a token passes."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    routed = sum(sizes[name] for name in expert_parameters(model))
    total = sum(sizes.values())
    feed_forward = model.config.feed_forward
    used = routed
    if isinstance(feed_forward, MoEConfig):
        used = routed * feed_forward.router.top_k // feed_forward.num_experts
    return {"total": total, "active": total - routed + used}


def _course(path: Path, step: int) -> dict[str, Any]:
    """Read how training went up to a step: last losses, hours of all steps, validation by step.

    A step that was done again after a restart counts once, as it is in the weights.
    """
    losses: dict[str, float] = {}
    seconds: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if values["step"] >= step:
            continue
        losses |= {k: v for k, v in values.items() if k.startswith("loss/")}
        if "speed/step_seconds" in values:
            seconds[values["step"]] = values["speed/step_seconds"]
        if "loss/validation" in values:
            validation[values["step"] + 1] = values["loss/validation"]
    return {
        "metrics": losses,
        # None without metrics, as where a checkpoint was copied out of its run.
        "training_hours": round(math.fsum(seconds.values()) / 3600, 4) if seconds else None,
        "validation_loss": {str(done): loss for done, loss in sorted(validation.items())},
    }
