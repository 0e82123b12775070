"""Compile what a block does between its routers and experts, by torch.compile.

Compiled are attention with both norms and the residual sum, and the dense or shared feed-forward
network. Routing, dispatch and routed experts stay as they are: their sizes are known only when
tokens have been routed, and ranks exchange rows there. Parameters keep their names.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsmoe.errors import ConfigError
from tsmoe.models.block import Block
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import MoELayer
from tsmoe.nn.spans import SeriesSpans


def compile_blocks(model: TimeTracker, *, device: torch.device, backend: str = "inductor") -> None:
    """Let training passes through the blocks run compiled; the first ones compile.

    All blocks share what is compiled, as they differ in weights only. Passes without gradients
    (validation, forecasts) and those over a graph of variates run as they are: each would be
    compiled anew for a few batches, and a graph is not known before it is seen.

    Args:
        model: to be trained.
        device: that it will be trained on.
        backend: of torch.compile.

    Raises:
        ConfigError: if this machine cannot compile for the model's device.
    """
    if backend == "inductor":
        _check_compiler(device)
    for block in model.blocks:
        assert isinstance(block, Block)
        # An attribute of the instance stands before the method of its class.
        block.attend = _compile(block.attend, _has_no_graph, backend=backend)  # type: ignore[method-assign]
        layer = block.feed_forward
        network = layer.always_on if isinstance(layer, MoELayer) else layer
        if network is not None:
            forward = _compile(network.forward, _always, backend=backend)
            network.forward = forward  # type: ignore[method-assign]


def _compile(
    function: Callable[..., Any], applies: Callable[..., bool], *, backend: str
) -> Callable[..., Any]:
    """Return what runs compiled in training passes, where it applies to the arguments."""
    # A whole graph or an error: breaks would hide what is not compiled.
    compiled = torch.compile(function, backend=backend, fullgraph=True)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:  # those of the function
        is_compiled = torch.is_grad_enabled() and applies(*arguments)
        return (compiled if is_compiled else function)(*arguments)

    return call


def _has_no_graph(_: Tensor, adjacency_BCC: Tensor | None, __: SeriesSpans | None) -> bool:
    return adjacency_BCC is None


def _always(_: Tensor) -> bool:
    return True


def _check_compiler(device: torch.device) -> None:
    """On CPU torch.compile writes C++ that includes Python.h, and needs what builds it."""
    if device.type != "cpu":
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler) is None:
        missing = f"the C++ compiler {compiler} is not on PATH (set CXX to name another)"
    elif not header.exists():
        missing = f"{header} does not exist; install Python's development files"
    else:
        return
    raise ConfigError(
        f"training.compiles_blocks is true, but {missing}; or set training.compiles_blocks=false"
    )
