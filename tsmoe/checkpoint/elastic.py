"""Full training state addressed by parameter name and global expert id.

An engine knows how to get and set the state of one parameter; this file knows what goes into which
file. Because nothing in the files depends on ranks, a run may continue on another number of them,
another expert-parallel size, another ZeRO stage, or without DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tsmoe.checkpoint.layout import DENSE_FILE, STATE_KINDS, CheckpointMeta, experts_file
from tsmoe.errors import CheckpointError
from tsmoe.moe.experts import Experts
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class ParameterState:
    """Master weight and Adam moments of a parameter, float32, of its shape on this rank."""

    value: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


Snapshot = dict[str, dict[str, Tensor]]
"""Tensors in host memory by file and key: what this rank has to write."""


def expert_parameters(model: nn.Module) -> dict[str, Experts]:
    """Name the parameters whose first axis is experts, with the module that knows their ids."""
    return {
        f"{prefix}.{name}": module
        for prefix, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters(recurse=False)
    }


def take_snapshot(
    model: nn.Module, get_state: Callable[[nn.Parameter], ParameterState], ranks: Ranks
) -> Snapshot:
    """Copy the training state to host memory, each tensor on the one rank that will write it.

    Collective: every rank must call it, as `get_state` may communicate.
    """
    experts = expert_parameters(model)
    dense: dict[str, Tensor] = {}
    routed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = get_state(parameter)
        owner = experts.get(name)
        for kind in STATE_KINDS:
            tensor = getattr(state, kind)
            if owner is None:
                if ranks.is_first:
                    dense[f"{kind}/{name}"] = _to_host(tensor)
            elif ranks.rank == owner.ranks.rank:
                # The first group of expert-parallel ranks writes; later ones hold copies.
                for local_id, expert_id in enumerate(owner.global_ids):
                    routed[f"{kind}/{name}/{expert_id}"] = _to_host(tensor[local_id])
    if ranks.is_first:
        for name in persistent_buffers(model):
            dense[f"buffer/{name}"] = model.get_buffer(name).detach().to("cpu", copy=True)
    snapshot: Snapshot = {DENSE_FILE: dense} if dense else {}
    if routed:
        snapshot[experts_file(ranks.rank)] = routed
    return snapshot


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that belong to the state."""
    parameters = {name for name, _ in model.named_parameters()}
    return [name for name in model.state_dict() if name not in parameters]


class StateReader:
    """Reads parameter states and buffers from the files of a whole checkpoint.

    Only what is asked for is read. Use as a context manager.
    """

    def __init__(self, folder: Path, meta: CheckpointMeta) -> None:
        self.folder = folder
        self._files: list[Any] = []
        self._key_to_file: dict[str, Any] = {}
        try:
            for record in meta.files:
                # No context manager: the files stay mapped until the reader is closed.
                file = safe_open(folder / record.name, framework="pt")
                self._files.append(file)
                self._key_to_file.update(dict.fromkeys(file.keys(), file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder / record.name}: cannot be read ({error}); use an older checkpoint"
            ) from error

    def __enter__(self) -> StateReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._key_to_file.clear()
        self._files.clear()

    def check_names(self, model: nn.Module) -> None:
        """Compare names with those of a model.

        Raises:
            CheckpointError: listing missing and unexpected parameters.
        """
        experts = expert_parameters(model)
        expected = {f"buffer/{name}" for name in persistent_buffers(model)}
        for name, _ in model.named_parameters():
            expected |= {
                f"value/{name}{suffix}"
                for suffix in (
                    [f"/{i}" for i in range(experts[name].num_experts)] if name in experts else [""]
                )
            }
        there = {key for key in self._key_to_file if key.startswith(("value/", "buffer/"))}
        if there != expected:
            raise CheckpointError(
                f"{self.folder}: a checkpoint of another model; missing: "
                f"{_some(expected - there)}; unexpected: {_some(there - expected)}"
            )

    def parameter(self, name: str, shape: torch.Size, owner: Experts | None) -> ParameterState:
        """Read a parameter's state, of an expert layer only this rank's experts."""
        state = {kind: self.tensor(kind, name, owner) for kind in STATE_KINDS}
        if state["value"].shape != shape:
            raise CheckpointError(
                f"{self.folder}: {name} has shape {tuple(state['value'].shape)}, but the model "
                f"wants {tuple(shape)}; use the config that the checkpoint was made with"
            )
        return ParameterState(**state)

    def tensor(self, kind: str, name: str, owner: Experts | None = None) -> Tensor:
        """Read one tensor; that of an expert layer is stacked from the experts of `owner`."""
        if owner is None:
            return self._get(f"{kind}/{name}")
        return torch.stack([self._get(f"{kind}/{name}/{i}") for i in owner.global_ids])

    def load_buffers(self, model: nn.Module) -> None:
        """Copy buffers into the model, in place."""
        for name in persistent_buffers(model):
            model.get_buffer(name).copy_(self._get(f"buffer/{name}"))

    def _get(self, key: str) -> Tensor:
        try:
            return self._key_to_file[key].get_tensor(key)
        except KeyError:
            raise CheckpointError(
                f"{self.folder}: {key} is missing; use an older checkpoint"
            ) from None


def restore(
    model: nn.Module,
    reader: StateReader,
    set_state: Callable[[nn.Parameter, ParameterState], None],
    *,
    shape_of: Callable[[nn.Parameter], torch.Size] = lambda parameter: parameter.shape,
) -> None:
    """Set every parameter's state and every buffer from a checkpoint.

    `shape_of` is for an engine that leaves only a slice of a parameter on this rank.

    Raises:
        CheckpointError: if the names or shapes are not those of the model.
    """
    reader.check_names(model)
    experts = expert_parameters(model)
    for name, parameter in model.named_parameters():
        set_state(parameter, reader.parameter(name, shape_of(parameter), experts.get(name)))
    reader.load_buffers(model)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    shown = ", ".join(ordered[:5]) or "none"
    return f"{shown} and {len(ordered) - 5} more" if len(ordered) > 5 else shown
