"""Runs as metrics for Prometheus, by the textfile collector of its node_exporter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tsmoe.status.state import Health, RunStatus

Value = Callable[[RunStatus], float | None]

# Name, type, help, and where the value is from; a run without it has no line.
_METRICS: tuple[tuple[str, str, str, Value], ...] = (
    ("tsmoe_step", "gauge", "Optimizer steps done.", lambda s: s.step),
    ("tsmoe_steps_planned", "gauge", "Optimizer steps of the whole run.",
     lambda s: s.steps_planned),
    ("tsmoe_eta_seconds", "gauge", "Seconds left at the present speed.", lambda s: s.eta_seconds),
    ("tsmoe_points_per_second", "gauge", "Points forecast a second, median of the newest steps.",
     lambda s: s.points_per_second),
    ("tsmoe_step_seconds", "gauge", "Seconds of a step, median of the newest.",
     lambda s: s.step_seconds),
    ("tsmoe_loss", "gauge", "Training loss of the newest step.", lambda s: s.loss),
    ("tsmoe_validation_loss", "gauge", "Newest validation loss.", lambda s: s.validation_loss),
    ("tsmoe_checkpoint_step", "gauge", "Step of the newest checkpoint.",
     lambda s: s.checkpoint.step if s.checkpoint else None),
    ("tsmoe_checkpoint_timestamp_seconds", "gauge", "When the newest checkpoint was saved.",
     lambda s: s.checkpoint.saved_at if s.checkpoint else None),
    ("tsmoe_checkpoint_whole", "gauge", "1 if its files have their sizes.",
     lambda s: s.checkpoint.damage is None if s.checkpoint else None),
    ("tsmoe_bad_steps_total", "counter", "Steps that were not finite and passed over.",
     lambda s: s.checkpoint.bad_steps if s.checkpoint else None),
    ("tsmoe_lost_shards", "gauge", "Bad shards that the run goes on without.",
     lambda s: s.lost_shards),
    ("tsmoe_restarts_total", "counter", "Restarts by the launcher.", lambda s: s.restarts),
    ("tsmoe_ranks", "gauge", "Processes that train.", lambda s: s.ranks),
    ("tsmoe_last_sign_timestamp_seconds", "gauge", "When the run last wrote anything.",
     lambda s: s.last_sign_at),
)  # fmt: skip
_HEALTH = "tsmoe_health"


def prometheus_text(statuses: Sequence[RunStatus]) -> str:
    """Write the text format: one family a metric, one line a run."""
    by_run = {status.run: status for status in statuses}  # a run that is named twice counts once
    lines = []
    for name, kind, about, value in _METRICS:
        lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        for status in by_run.values():
            found = value(status)
            if found is not None:
                lines.append(f"{name}{{{_label('run', status.run)}}} {float(found)!r}")
    lines += [f"# HELP {_HEALTH} 1 for the state that a run is in.", f"# TYPE {_HEALTH} gauge"]
    for status in by_run.values():
        for health in Health:
            labels = f"{_label('run', status.run)},{_label('state', health.value)}"
            lines.append(f"{_HEALTH}{{{labels}}} {int(status.health is health)}")
    return "\n".join(lines) + "\n"


def write_prometheus(path: Path, statuses: Sequence[RunStatus]) -> None:
    """Replace the file at once: the collector sees the old one or the new one, whole."""
    # Its name does not end in .prom: the collector reads every such file.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(prometheus_text(statuses), encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _label(name: str, value: str) -> str:
    escaped = value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{escaped}"'
