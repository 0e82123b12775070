"""Packages: a model to hand on, as one folder that plain torch loads.

model.safetensors   full weights and buffers, experts stacked
model.yaml          the model's config section
card.json           format version, how it was trained, on what, metrics, licence
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tsmoe.checkpoint.elastic import StateReader, expert_parameters
from tsmoe.checkpoint.layout import (
    INCOMPLETE_PREFIX,
    CheckpointMeta,
    sha256_of,
    sync_folder,
    write_tensors,
)
from tsmoe.config import decode, encode, read_yaml
from tsmoe.errors import CheckpointError, ConfigError
from tsmoe.models import Model, ModelConfig, build_model

PACKAGE_VERSION = 1
WEIGHTS_FILE, MODEL_FILE, CARD_FILE = "model.safetensors", "model.yaml", "card.json"


def save_package(folder: Path, model: Model, card: dict[str, Any]) -> None:
    """Write a package, or replace an older one, so that it is there whole or not at all.

    Raises:
        CheckpointError: if the folder holds something else, or cannot be written.
    """
    is_free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_free and not (folder / CARD_FILE).exists():
        raise CheckpointError(f"{folder}: exists and is no package; choose another folder")
    temporary = folder.with_name(f"{INCOMPLETE_PREFIX}{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        write_tensors(temporary / WEIGHTS_FILE, state)
        (temporary / MODEL_FILE).write_text(
            yaml.safe_dump(encode(model.config), sort_keys=False), encoding="utf-8"
        )
        card = {
            "format_version": PACKAGE_VERSION,
            **card,
            "weights_sha256": sha256_of(temporary / WEIGHTS_FILE),
        }
        (temporary / CARD_FILE).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        for name in (MODEL_FILE, CARD_FILE):
            with (temporary / name).open("rb") as stream:
                os.fsync(stream.fileno())
        former = folder.with_name(f"{INCOMPLETE_PREFIX}former-{folder.name}")
        shutil.rmtree(former, ignore_errors=True)
        if folder.exists():
            folder.rename(former)
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"{folder}: the package could not be written: {error}") from error


def load_package(folder: Path) -> tuple[Model, dict[str, Any]]:
    """Build the model of a package and load its weights, strictly.

    Returns:
        The model in evaluation mode on the CPU, and the card.

    Raises:
        CheckpointError: if a part is missing, damaged, of another version, or does not fit.
    """
    for name in (CARD_FILE, MODEL_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            made = folder / "package"  # of a run of fine-tuning
            advice = "make one with `tsmoe export RUN PACKAGE`"
            if (made / CARD_FILE).is_file():
                advice = f"that of the run is {made}"
            raise CheckpointError(f"{folder}: no {name}, so this is no package; {advice}")
    try:
        card = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CARD_FILE}: cannot be read: {error}") from error
    version = card.get("format_version") if isinstance(card, dict) else None
    if version != PACKAGE_VERSION:
        raise CheckpointError(
            f"{folder / CARD_FILE}: package version {version}, but this tsmoe reads "
            f"{PACKAGE_VERSION}; use the version of tsmoe that wrote it"
        )
    try:
        config = _decode_model(read_yaml(folder / MODEL_FILE), origin=str(folder / MODEL_FILE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    model = build_model(config)
    if card.get("weights_sha256") != sha256_of(folder / WEIGHTS_FILE):
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: was altered: its sha256 differs from {CARD_FILE}; "
            "copy or export the package again"
        )
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: cannot be read ({error}); export the package again"
        ) from error
    _load_strictly(model, state, folder)
    return model.eval(), card


def model_from_checkpoint(
    folder: Path, meta: CheckpointMeta, *, prepare: Callable[[Any], None] | None = None
) -> Model:
    """Build the whole model of a checkpoint in this process, experts of all ranks together.

    `prepare` adds what training had added to the model before its weights are read.
    """
    config = _decode_model(meta.config["model"], origin=f"{folder}: model")
    model = build_model(config)
    if prepare is not None:
        prepare(model)
    experts = expert_parameters(model)
    with StateReader(folder, meta) as reader, torch.no_grad():
        reader.check_names(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(reader.parameter(name, parameter.shape, experts.get(name)).value)
        reader.load_buffers(model)
    return model.eval()


def _decode_model(values: dict[str, Any], *, origin: str) -> ModelConfig:
    section: Any = ModelConfig  # a union, which pydantic takes and `type` does not describe
    return decode(section, values, origin=origin)


def _load_strictly(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = model.state_dict()
    missing, unexpected = sorted(wanted.keys() - state), sorted(state.keys() - wanted)
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: weights do not fit {MODEL_FILE}; missing: {', '.join(missing) or 'none'}; "
            f"unexpected: {', '.join(unexpected) or 'none'}"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(state[name].shape)}, but {MODEL_FILE} wants "
                f"{tuple(tensor.shape)}"
            )
    model.load_state_dict(state, strict=True)
