"""What is recorded of each step: metrics.jsonl and tensorboard, written by the first rank.

Shapes: E routed experts, M expert layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsmoe.checkpoint.layout import write_text
from tsmoe.moe.routers import AnyRouter
from tsmoe.run_folder import METRICS_FILE
from tsmoe.train.board import FORECASTS_TAG, SETTINGS_TAG, layout, settings_text
from tsmoe.train.durable_record import Board, LineFile
from tsmoe.train.held_out import HeldOutForecast, draw_forecasts
from tsmoe.train.load_history import DEAD_AFTER_STEPS, LoadHistory
from tsmoe.train.step import StepReport
from tsmoe.train.telemetry import StepCost
from tsmoe.train.throughput import Throughput

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

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        log_every_steps: int,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the files; what an earlier start recorded from `first_step` on is dropped.

        Args:
            run: folder.
            first_step: the first to be recorded.
            log_every_steps: steps between points of tensorboard.
            start: what the run is started on; stands in the line of the first step.
        """
        path = run / METRICS_FILE
        self._history = LoadHistory()
        _keep_before(path, first_step, self._history)
        self._lines = LineFile(path)
        self._board = Board(run / "tensorboard", purge_step=first_step)
        if (settings := settings_text(run)) is not None:
            self._board.add_text(SETTINGS_TAG, settings, first_step)
        self._has_layout = False
        self._log_every_steps = log_every_steps
        self._start = start

    def write_step(
        self, step: int, report: StepReport, *, bias_ME: Tensor, speed: Throughput
    ) -> None:
        """Record a training step.

        Args:
            step: number of the step, from 0.
            report: of the step.
            bias_ME: load bias after the step.
            speed: of the step.
        """
        is_shown = step % self._log_every_steps == 0
        scalars: dict[str, float | None] = {
            "loss/train": report.loss,
            **({"loss/regulariser": report.regulariser} if report.regulariser else {}),
            "optimizer/grad_norm": report.grad_norm,
            "optimizer/lr": report.lr,
            **speed.as_metrics(),
            "data/points": report.num_points,
            "data/tokens": report.num_tokens,
        }
        self._history.add(step, report.load_ME.numpy())
        dead = self._history.dead_experts()
        # A margin is NaN where every expert is chosen; JSON has no such number.
        margin_M = [None if math.isnan(value) else value for value in report.margin_M.tolist()]
        experts: dict[str, Sequence[float | None]] = {
            **expert_metrics(report.load_ME), "margin": margin_M
        }  # fmt: skip
        line: dict[str, Any] = {"step": step, **scalars, "experts": experts | {
            "load": report.load_ME.tolist(), "load_bias": bias_ME.tolist(),
            "dead": {"after_steps": DEAD_AFTER_STEPS, "ids": dead}}}  # fmt: skip
        if self._start is not None:
            line["speed/start"], self._start = self._start, None
        by_layer: dict[str, Sequence[float | None]] = {
            f"experts/{name}": values for name, values in experts.items()
        }
        if dead is not None:
            by_layer["experts/dead"] = [len(ids) for ids in dead]
        if report.cost_before is not None:
            of_ranks, of_layers = cost_metrics(report.cost_before, lists_ranks=is_shown)
            scalars |= {f"speed/{k}": v for k, v in of_ranks.items() if not isinstance(v, list)}
            by_layer |= {f"exchange/{name}": values for name, values in of_layers.items()}
            line["speed/of_step_before"] = of_ranks | of_layers
        self._write_line(line)
        if is_shown:
            share_ME = report.load_ME / report.load_ME.sum(-1, keepdim=True).clamp(min=1)
            of_experts = _by_expert("load_share", share_ME) | _by_expert("load_bias", bias_ME)
            self._write_scalars(step, scalars | _by_layer(by_layer) | of_experts)
            self._show(num_layers=len(report.load_ME))

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

    def write_not_finite(self, step: int, event: Mapping[str, Any]) -> None:
        """Record a step whose loss or gradient was not finite, and what followed."""
        self._write_line({"step": step, "not_finite": dict(event)})

    def write_validation(
        self,
        step: int,
        loss: float,
        *,
        seconds: float,
        forecasts: Sequence[HeldOutForecast] = (),
    ) -> None:
        """Record the validation loss after a step; show pictures of loads so far and forecasts."""
        scalars = {"loss/validation": loss, "speed/validation_seconds": seconds}
        self._write_line({"step": step, **scalars})
        self._write_scalars(step, scalars)
        for name, picture in self._history.pictures().items():
            self._board.add_image(f"experts/{name}", picture, step, dataformats="HWC")
        if forecasts:
            self._board.add_image(FORECASTS_TAG, draw_forecasts(forecasts), step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Write out what is buffered."""
        self._lines.close()
        self._board.close()

    def _show(self, *, num_layers: int) -> None:
        """Let tensorboard see the step now: what is buffered when a run is killed is lost.

        The steps before the checkpoint that the run goes on from are not done again, so they would
        stay missing.
        """
        if not self._has_layout:
            self._board.add_custom_scalars(layout(num_layers))
            self._has_layout = True
        self._board.flush()

    def _write_line(self, values: dict[str, Any]) -> None:
        self._lines.write(values)

    def _write_scalars(self, step: int, scalars: Mapping[str, float | None]) -> None:
        self._board.add_scalars(scalars, step)


def cost_metrics(
    cost: StepCost, *, lists_ranks: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Name what the step before cost: values of all ranks together, and lists by expert layer.

    Args:
        cost: of the step before.
        lists_ranks: whether to add the lists by rank, which are long where ranks are many.
    """
    of_ranks: dict[str, Any] = {
        "communication_share": cost.communication_share,
        "all_to_all_share": cost.all_to_all_seconds / cost.step_seconds,
        "all_ranks_data_wait_share": cost.data_wait_share,
        "straggler_spread_seconds": cost.straggler_spread_seconds,
        "slowest_rank": cost.slowest_rank,
        "peak_memory_bytes": max(cost.memory_bytes_R),
        "bytes_out": cost.bytes_out,
    }
    if lists_ranks:
        of_ranks |= {
            "compute_seconds": cost.compute_seconds_R,
            "data_wait_seconds": cost.data_wait_seconds_R,
            "memory_bytes": cost.memory_bytes_R,
        }
    return of_ranks, {
        "rows_moved": list(cost.rows_moved_M),
        "forward_seconds": cost.forward_all_to_all_seconds_M,
        "backward_seconds": cost.backward_all_to_all_seconds_M,
    }


def _by_layer(lists: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    return {
        f"{name}/layer_{layer:02}": value
        for name, values in lists.items()
        for layer, value in enumerate(values)
    }


def _by_expert(name: str, table_ME: Tensor) -> dict[str, float | None]:
    return {
        f"{name}/layer_{layer:02}/expert_{expert:03}": value
        for layer, row in enumerate(table_ME.tolist())
        for expert, value in enumerate(row)
    }


def load_biases(routers: list[AnyRouter]) -> Tensor:
    """Stack the load bias of each expert layer, on the CPU."""
    if not routers:
        return torch.zeros(0, 0)
    return torch.stack([router.balance.bias_E.detach().cpu() for router in routers])


def _keep_before(path: Path, step: int, history: LoadHistory) -> None:
    """Cut the file back to the lines before a step, and fill the history from them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if values["step"] < step:
            kept.append(line)
            history.add_line(values)  # one by one: all lines at once, decoded, are large
    write_text(path, "".join(f"{line}\n" for line in kept))
