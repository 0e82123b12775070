"""Names of what a run leaves in its folder, and how its starts ended; nothing heavy is imported."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

METRICS_FILE, CONFIG_FILE, RESTARTS_FILE = "metrics.jsonl", "config.yaml", "restarts.jsonl"
CHECKPOINTS_FOLDER, LOCK_FILE = "checkpoints", ".lock"
DONE_MARKER, REQUEUE_MARKER = "DONE", "REQUEUE"
QUARANTINE_FILE = "quarantine.json"
STOP_NOTE = "STOP"
"""A file that somebody makes to ask a run to save and end."""


@dataclass(frozen=True, kw_only=True)
class EndOfStart:
    """How one start of a run ended, as the launcher wrote it down."""

    time: datetime
    job: str | None
    restart: int
    """Number of the start, the first is 0."""
    exit_code: int | None
    """None where nobody was left to say, as when a machine went down."""
    outcome: str
    """`done`, `stopped` or `crashed`."""
    step_before: int
    step: int
    """Of the newest checkpoint, before the start and after it."""
    nodes: tuple[str, ...]
    decision: str
    """`none`, `restart` or `give_up`."""
    reason: str


def read_ends(run: Path) -> list[EndOfStart]:
    """Read how the starts of a run ended, oldest first; empty where no launcher wrote it down.

    Lines that cannot be read, such as one that is just being written, are left out.
    """
    try:
        text = (run / RESTARTS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    ends = []
    for line in text.splitlines():
        try:
            ends.append(_end(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            continue
    return ends


def read_lost_shards(run: Path) -> list[dict[str, Any]]:
    """Read which shards a run goes on without; most runs have none.

    Each has its `file`, its `points`, the `step` from which on it is lost and the `reason`, as far
    as they can be read.
    """
    try:
        entries = json.loads((run / QUARANTINE_FILE).read_text(encoding="utf-8"))["shards"]
        return [dict(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _end(values: dict[str, Any]) -> EndOfStart:
    time = datetime.fromisoformat(values["time"])
    return EndOfStart(
        time=time if time.tzinfo is not None else time.replace(tzinfo=UTC),
        job=None if values.get("job") is None else str(values["job"]),
        restart=int(values["restart"]),
        exit_code=None if values["exit_code"] is None else int(values["exit_code"]),
        outcome=str(values["outcome"]),
        step_before=int(values["step_before"]),
        step=int(values["step"]),
        nodes=tuple(map(str, values.get("nodes") or ())),
        decision=str(values["decision"]),
        reason=str(values.get("reason") or ""),
    )
