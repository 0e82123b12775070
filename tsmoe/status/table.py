"""Runs as a table of plain text, one line each, with what there is to remark below."""

from __future__ import annotations

from collections.abc import Sequence

from tsmoe.run_folder import METRICS_FILE, QUARANTINE_FILE
from tsmoe.status.state import RunStatus

_HEADER = ("run", "health", "step", "left", "points/s", "loss", "validation", "checkpoint",
           "restarts", "ranks")  # fmt: skip


def table(statuses: Sequence[RunStatus]) -> str:
    """Lay out how runs stand."""
    rows = [_HEADER, *(_row(status) for status in statuses)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*lines, *(text for status in statuses for text in _remarks(status))])


def duration(seconds: float) -> str:
    """Write a time span in the two largest of its units, such as `3 h 05 min`."""
    whole = max(0, round(seconds))
    for unit, name, part, part_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= unit:
            return f"{whole // unit} {name} {whole % unit // part:02} {part_name}"
    return f"{whole} s"


def _row(status: RunStatus) -> tuple[str, ...]:
    planned = "" if status.steps_planned is None else f" of {status.steps_planned:,}"
    validation = _number(status.validation_loss, ".4f")
    if status.validation_step is not None:
        validation += f" @ {status.validation_step:,}"
    checkpoint = "-"
    if status.checkpoint is not None:
        age = duration(status.looked_at - status.checkpoint.saved_at)
        checkpoint = f"{status.checkpoint.step:,}, {age} old"
    return (
        status.run,
        status.health.value,
        f"{status.step:,}{planned}",
        "-" if status.eta_seconds is None else duration(status.eta_seconds),
        _number(status.points_per_second, ",.0f"),
        _number(status.loss, ".4f"),
        validation,
        checkpoint,
        str(status.restarts),
        _number(status.ranks, "d"),
    )


def _remarks(status: RunStatus) -> list[str]:
    found = []
    if status.remark:
        found.append(f"{status.run}: {status.health.value}: {status.remark}")
    if status.checkpoint is not None and status.checkpoint.damage is not None:
        found.append(
            f"{status.run}: checkpoint of step {status.checkpoint.step} is not whole: "
            f"{status.checkpoint.damage}"
        )
    if status.checkpoint is not None and status.checkpoint.bad_steps:
        found.append(
            f"{status.run}: {status.checkpoint.bad_steps} step(s) were not finite and passed over; "
            f"{METRICS_FILE} names their series"
        )
    if status.lost_shards:
        found.append(
            f"{status.run}: goes on without {status.lost_shards} bad shard(s) of its corpus, see "
            f"{QUARANTINE_FILE}"
        )
    end = status.last_end
    if end is not None and end.reason and end.reason not in status.remark:
        found.append(f"{status.run}: last start {end.outcome}: {end.reason}")
    return found


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
