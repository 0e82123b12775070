"""Read what a run recorded, whether it is done, stopped or still going on.

Runs of older versions lack some values: what is not there stays NaN or empty, and `gaps` tells.

Shapes: S steps, M expert layers, E routed experts, R ranks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tsmoe.errors import DataError
from tsmoe.report.graph import GRAPH, VariateLinks, read_graph
from tsmoe.report.survival import KeptCheckpoint, kept_checkpoints
from tsmoe.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    DONE_MARKER,
    METRICS_FILE,
    REQUEUE_MARKER,
    EndOfStart,
    read_ends,
    read_lost_shards,
)

RESULT = "result.json"
# Tables of each step, which are large, are kept of so many steps, evenly apart.
_TABLES_KEPT = 512

# Scalars of a step that the report looks at, by their names in metrics.jsonl.
SCALARS = (
    "loss/train",
    "optimizer/grad_norm",
    "optimizer/lr",
    "speed/step_seconds",
    "speed/points_per_second",
    "speed/tokens_per_second",
    "speed/flops_per_second",
    "speed/mfu",
    "speed/data_wait_share",
)
OF_STEP_BEFORE = (
    "communication_share",
    "all_to_all_share",
    "straggler_spread_seconds",
    "slowest_rank",
    "peak_memory_bytes",
    "bytes_out",
)
_BY_EXPERT = ("load", "load_bias")
BY_LAYER = ("load_entropy", "live_experts", "margin")
EXCHANGE_BY_LAYER = ("rows_moved", "forward_seconds", "backward_seconds")
BY_RANK = ("compute_seconds", "data_wait_seconds", "memory_bytes")


class Thinned:
    """A list of (step, table) pairs that never grows long: every second one goes when it would."""

    def __init__(self) -> None:
        self._pairs: list[tuple[int, np.ndarray]] = []
        self._every, self._seen = 1, 0

    def add(self, step: int, array: np.ndarray) -> None:
        """Keep a table, or not; one of another shape than before begins anew."""
        if self._pairs and self._pairs[-1][1].shape != array.shape:
            self._pairs, self._every, self._seen = [], 1, 0
        if self._seen % self._every == 0:
            self._pairs.append((step, array))
        self._seen += 1
        if len(self._pairs) > _TABLES_KEPT:
            self._pairs = self._pairs[::2]
            self._every *= 2

    @property
    def steps(self) -> np.ndarray:
        """Steps of the tables that were kept."""
        return np.array([step for step, _ in self._pairs])

    @property
    def tables(self) -> np.ndarray:
        """The tables, stacked along a first axis S."""
        return np.stack([table for _, table in self._pairs])

    def __bool__(self) -> bool:
        return bool(self._pairs)


@dataclass(kw_only=True)
class RunHistory:
    """What was recorded of a run, in order of step."""

    path: Path
    config: Mapping[str, Any]
    """Resolved settings; empty if the folder has none."""
    state: str
    """`done`, `stopped` (it will go on when started again) or `unfinished`."""
    steps: np.ndarray
    scalars: dict[str, np.ndarray]
    """By name, one value a step, NaN where there is none; those of `OF_STEP_BEFORE` too, which
    tell of the step before."""
    tables: dict[str, Thinned]
    """`load`, `load_bias`, `BY_LAYER`, `EXCHANGE_BY_LAYER` and `BY_RANK`, those that are there."""
    dead: Mapping[str, Any] | None
    """Newest list of dead experts, and after how many steps one counts as dead."""
    validation: list[tuple[int, float]]
    sources: list[tuple[int, dict[str, float]]]
    streams: list[tuple[int, dict[str, Any]]]
    starts: list[tuple[int, dict[str, Any]]]
    """Steps at which the run was started or went on, and on what."""
    verdict: str | None
    """Of a fine-tuning run that is done: whether what was learned is better than its start."""
    graph: VariateLinks | None
    """Of the variates, once a fine-tuning run that mixes them is done."""
    ends: list[EndOfStart]
    """How its starts ended, where a launcher wrote it down."""
    not_finite: list[dict[str, Any]]
    """Steps whose windows were not learned from: `step`, `what` was not finite, the `action` that
    was taken, `to` which step it rolled back if it did, and the `windows` (first and behind the
    last) and `series` that it was."""
    lost_shards: list[dict[str, Any]]
    """Shards of the corpus that it goes on without, as `read_lost_shards` gives them."""
    checkpoints: list[KeptCheckpoint]
    num_unreadable: int
    """Lines that are not as a run writes them: cut short by a kill, being written, or altered."""

    @property
    def num_layers(self) -> int:
        """Expert layers."""
        return int(self.tables["load"].tables.shape[1]) if self.tables.get("load") else 0


def read_run(path: Path) -> RunHistory:
    """Read the folder of a run.

    Raises:
        DataError: if it is no run, or no step was recorded yet.
    """
    metrics = path / METRICS_FILE
    if not metrics.is_file():
        raise DataError(
            f"{path}: is no folder of a run (it has no {METRICS_FILE}); give what "
            "`tsmoe pretrain` or `tsmoe finetune` was given as run="
        )
    reader = _Reader()
    for line in _lines(metrics):
        reader.read(line)
    if not reader.steps:
        raise DataError(f"{metrics}: no step was recorded yet; try again in a moment")
    return RunHistory(
        path=path,
        config=_config(path / CONFIG_FILE),
        state="done" if (path / DONE_MARKER).exists()
        else "stopped" if (path / REQUEUE_MARKER).exists() else "unfinished",
        steps=np.array(reader.steps),
        scalars={name: np.array(values, dtype=float) for name, values in reader.scalars.items()},
        tables=reader.tables,
        dead=reader.dead,
        validation=reader.validation,
        sources=reader.sources,
        streams=reader.streams,
        starts=reader.starts,
        verdict=_verdict(path / RESULT),
        graph=read_graph(path / GRAPH),
        ends=read_ends(path),
        not_finite=reader.not_finite,
        lost_shards=read_lost_shards(path),
        checkpoints=kept_checkpoints(path / CHECKPOINTS_FOLDER),
        num_unreadable=reader.num_unreadable,
    )  # fmt: skip


def gaps(history: RunHistory) -> list[str]:
    """Say what a reader of the report will miss, and why."""
    found = []
    if not history.config:
        found.append(f"settings: there is no readable {CONFIG_FILE}")
    for name in (*SCALARS, *OF_STEP_BEFORE):
        values = history.scalars[name]
        first = np.flatnonzero(~np.isnan(values))
        if not first.size:
            reason = "not recorded"
            if (
                name == "speed/mfu"
                and not np.isnan(history.scalars["speed/flops_per_second"]).all()
            ):
                reason = "the peak of this device is not known"
            elif name in OF_STEP_BEFORE and len(values) == 1:
                reason = "it comes with the second step"
            found.append(f"{name.rpartition('/')[2]}: {reason}")
        elif name in SCALARS and first[0] > 0:
            found.append(f"{name.rpartition('/')[2]}: recorded from step {history.steps[first[0]]}")
    if not history.num_layers:
        found.append("experts: no loads were recorded (a dense model has none)")
    else:
        for name in ("margin", *EXCHANGE_BY_LAYER, *BY_RANK):
            if not history.tables.get(name) and not (name in BY_RANK and len(history.steps) == 1):
                found.append(
                    f"{name} of each {'rank' if name in BY_RANK else 'layer'}: not recorded"
                )
    if not history.validation:
        found.append("validation loss: there is none yet")
    if history.num_unreadable:
        lines = f"{history.num_unreadable} line(s) of {METRICS_FILE}"
        found.append(f"{lines}: cannot be read, left out")
    return found


@dataclass(kw_only=True)
class _Reader:
    """Sorts lines of metrics by what they hold."""

    steps: list[int] = field(default_factory=list)
    scalars: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in (*SCALARS, *OF_STEP_BEFORE)}
    )
    tables: dict[str, Thinned] = field(default_factory=dict)
    dead: Mapping[str, Any] | None = None
    validation: list[tuple[int, float]] = field(default_factory=list)
    sources: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    streams: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    starts: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    not_finite: list[dict[str, Any]] = field(default_factory=list)
    num_unreadable: int = 0

    def read(self, text: str) -> None:
        try:
            line = json.loads(text)
            step = int(line["step"])
            validation = float(line.get("loss/validation", np.nan))
            if "loss/train" in line:
                self._read_step(step, line)
            if "not_finite" in line:
                self.not_finite.append(_bad_step(line["not_finite"]))
        except (ValueError, TypeError, KeyError, AttributeError):
            self.num_unreadable += 1
            return
        if not np.isnan(validation):
            self.validation.append((step, validation))
        if "sources" in line:
            self.sources.append((step, line["sources"]))
        if "stream" in line:
            self.streams.append((step, line["stream"]))

    def _read_step(self, step: int, line: Mapping[str, Any]) -> None:
        before = line.get("speed/of_step_before", {})
        scalars = {}
        for name in self.scalars:
            value = (before if name in OF_STEP_BEFORE else line).get(name)
            scalars[name] = np.nan if value is None else float(value)
        experts = line.get("experts", {})
        by_name = {name: experts.get(name) for name in ("load", "load_bias", *BY_LAYER)}
        by_name |= {name: before.get(name) for name in (*EXCHANGE_BY_LAYER, *BY_RANK)}
        tables = {n: _table(n, table) for n, table in by_name.items() if table}
        # All of the line can be read: only now is any of it kept.
        self.steps.append(step)
        for name, number in scalars.items():
            self.scalars[name].append(number)
        for name, array in tables.items():
            self.tables.setdefault(name, Thinned()).add(step, array)
        self.dead = experts.get("dead", self.dead)
        if "speed/start" in line:
            self.starts.append((step, line["speed/start"]))


def _bad_step(values: Mapping[str, Any]) -> dict[str, Any]:
    first, stop = values["windows"]
    return {
        "step": int(values["step"]),
        "what": str(values["what"]),
        "action": str(values["action"]),
        "to": None if values.get("to") is None else int(values["to"]),
        "windows": [int(first), int(stop)],
        "series": [str(name) for name in values["series"]],
    }


def _table(name: str, values: Any) -> np.ndarray:
    """Read a table of a line, by layer and expert or a list.

    Raises:
        ValueError: if it is no such table.
    """
    array = np.array(values, dtype=np.float64)  # null becomes NaN
    if array.ndim != (2 if name in _BY_EXPERT else 1):
        raise ValueError(f"{name} has {array.ndim} axes")
    return array


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                yield line


def _verdict(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["verdict"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _config(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
