"""Refuse windows of more variates than memory holds, with the number that fits."""

from __future__ import annotations

import socket
from collections.abc import Callable

import psutil
import torch

from tsmoe.cost.layout import Layout, layout_of
from tsmoe.cost.memory import plan_memory
from tsmoe.errors import ConfigError
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.table import SplitTable
from tsmoe.ranks import Ranks


def check_memory(run: FinetuneRun, split: SplitTable, ranks: Ranks) -> None:
    """Compare what a step takes, by `tsmoe plan`'s reckoning, with what is free. Collective.

    Raises:
        ConfigError: with the largest micro-batch and number of variates that fit.
    """
    if not run.model.num_channel_mixed_layers:
        return
    layout = layout_of(run, ranks.size, is_on_gpu=ranks.device.type == "cuda")
    # Of the rank that has least, so that all decide alike. Collective.
    free = min(ranks.gather(free_bytes(ranks)))
    variates = _variates(run, split)
    if _bytes(run, layout, variates) <= free:
        return
    most = _largest(lambda count: _bytes(run, layout, count) <= free, variates)
    advice = "no number of variates fits: set training.micro_batch_size lower"
    if most > split.num_covariates:
        advice = (
            f"{most} fit at training.micro_batch_size={layout.micro_batch_size}: set "
            f"training.max_variates={most - split.num_covariates} to draw so many targets for each "
            "step (validation and test see all), or a smaller micro_batch_size"
        )
    raise ConfigError(
        f"{split.table.path}: windows of {variates} variates take "
        f"{_bytes(run, layout, variates) / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are "
        f"free; {advice}"
    )


def free_bytes(ranks: Ranks) -> int:
    """Return what this rank may take: of its GPU, or its part of the machine's. Collective."""
    if ranks.device.type == "cuda":
        return torch.cuda.mem_get_info(ranks.device)[0]
    hosts = ranks.gather(socket.gethostname())
    return psutil.virtual_memory().available // hosts.count(socket.gethostname())


def _variates(run: FinetuneRun, split: SplitTable) -> int:
    targets = split.num_targets
    if run.training.max_variates is not None:
        targets = min(targets, run.training.max_variates)
    return targets + split.num_covariates


def _bytes(run: FinetuneRun, layout: Layout, variates: int) -> int:
    return plan_memory(run.model, layout, variates=variates).total


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count below `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
