"""What is recorded of each step: metrics.jsonl and tensorboard, written by the first rank.

Shapes: E routed experts, M expert layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsmoe.checkpoint.layout import write_text
from tsmoe.errors import CheckpointError
from tsmoe.moe.routers import AnyRouter
from tsmoe.train.step import StepReport

# An expert is live if it gets at least this part of the mean load.
LIVE_SHARE = 0.25
# Tensorboard shows so many of the sources, the largest; metrics.jsonl has all.
SOURCES_SHOWN = 64


def expert_metrics(load_ME: Tensor) -> dict[str, list[float]]:
    """Describe how evenly each layer's experts are used.

    Returns:
        `load_entropy`: entropy of the load over its maximum, 1 when even, by layer;
        `live_experts`: share of experts that get at least a quarter of the mean load, by layer.
    """
    share_ME = load_ME.double() / load_ME.sum(-1, keepdim=True).clamp(min=1)
    entropy_M = -(share_ME * share_ME.clamp(min=1e-30).log()).sum(-1)
    num_experts = load_ME.shape[-1]
    most = math.log(num_experts) if num_experts > 1 else 1.0
    is_live_ME = share_ME * num_experts >= LIVE_SHARE
    return {
        "load_entropy": (entropy_M / most).tolist(),
        "live_experts": is_live_ME.double().mean(-1).tolist(),
    }


class MetricsWriter:
    """Appends to metrics.jsonl every step and to tensorboard now and then."""

    def __init__(self, run: Path, *, first_step: int, log_every_steps: int) -> None:
        """Open the files; what an earlier start recorded from `first_step` on is dropped."""
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        _keep_before(path, first_step)
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        self._lines: FileIO = path.open("ab", buffering=0)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)
        self._log_every_steps = log_every_steps

    def write_step(
        self,
        step: int,
        report: StepReport,
        *,
        bias_ME: Tensor,
        points_per_second: float,
        data_wait_share: float,
    ) -> None:
        """Record a training step.

        Args:
            step: number of the step, from 0.
            report: of the step.
            bias_ME: load bias after the step.
            points_per_second: recorded points of all ranks over the wall time of the step.
            data_wait_share: part of the step's wall time that this rank waited for data.
        """
        scalars = {
            "loss/train": report.loss,
            "optimizer/grad_norm": report.grad_norm,
            "optimizer/lr": report.lr,
            "speed/points_per_second": points_per_second,
            "speed/data_wait_share": data_wait_share,
            "data/points": report.num_points,
        }
        experts = expert_metrics(report.load_ME)
        self._write_line({"step": step, **scalars, "experts": experts | {
            "load": report.load_ME.tolist(), "load_bias": bias_ME.tolist()}})  # fmt: skip
        if step % self._log_every_steps:
            return
        self._write_scalars(step, scalars)
        for name, values in experts.items():
            self._write_scalars(
                step, {f"experts/{name}/layer_{m:02}": v for m, v in enumerate(values)}
            )
        share_ME = report.load_ME / report.load_ME.sum(-1, keepdim=True).clamp(min=1)
        for name, table in (("load_share", share_ME), ("load_bias", bias_ME)):
            for layer, row in enumerate(table.tolist()):
                tags = {f"{name}/layer_{layer:02}/expert_{e:03}": v for e, v in enumerate(row)}
                self._write_scalars(step, tags)

    def write_sources(self, step: int, shares: Mapping[str, float]) -> None:
        """Record the part that each source had in the windows since the last such line."""
        self._write_line({"step": step, "sources": dict(shares)})
        largest = sorted(shares, key=lambda name: -shares[name])[:SOURCES_SHOWN]
        self._write_scalars(step, {f"sources/{name}": shares[name] for name in largest})

    def write_stream(self, step: int, counts: Mapping[str, Any]) -> None:
        """Record the epoch of a stream, and the series used and left out since its beginning."""
        self._write_line({"step": step, "stream": dict(counts)})
        dropped = sum(counts["drops"].values())
        scalars = {"epoch": counts["epoch"], "series_used": counts["used"], "dropped": dropped}
        self._write_scalars(step, {f"stream/{name}": value for name, value in scalars.items()})

    def write_validation(self, step: int, loss: float) -> None:
        """Record the validation loss after a step."""
        self._write_line({"step": step, "loss/validation": loss})
        self._write_scalars(step, {"loss/validation": loss})
        self._board.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        self._lines.close()
        self._board.close()

    def _write_line(self, values: dict[str, Any]) -> None:
        try:
            self._lines.write(f"{json.dumps(values)}\n".encode())
        except OSError as error:
            raise CheckpointError(
                f"{self._lines.name}: cannot be written ({error}); free some space and start the "
                "same command again: it resumes from the last checkpoint"
            ) from error

    def _write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            self._board.add_scalar(tag, value, step)


def load_biases(routers: list[AnyRouter]) -> Tensor:
    """Stack the load bias of each expert layer, on the CPU."""
    if not routers:
        return torch.zeros(0, 0)
    return torch.stack([router.balance.bias_E.detach().cpu() for router in routers])


def _keep_before(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except ValueError:
            continue  # a line cut short by a kill
    write_text(path, "".join(f"{line}\n" for line in kept))
