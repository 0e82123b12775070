"""How a run stands: how far it is, how fast, how it was saved, and whether it is well."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tsmoe.checkpoint.layout import (
    INCOMPLETE_PREFIX,
    LATEST_FILE,
    META_FILE,
    find_missing_bytes,
    read_meta,
    step_folders,
)
from tsmoe.errors import CheckpointError, DataError
from tsmoe.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    DONE_MARKER,
    LOCK_FILE,
    METRICS_FILE,
    REQUEUE_MARKER,
    RESTARTS_FILE,
    EndOfStart,
    read_ends,
    read_lost_shards,
)
from tsmoe.status.tail import MetricsTail, number, read_tail

# What tells a folder of a run from another.
_SIGNS = (CONFIG_FILE, METRICS_FILE, RESTARTS_FILE, CHECKPOINTS_FOLDER, LOCK_FILE)
# A run that is silent for less has not stalled, however quick its steps are.
LEAST_SILENCE_SECONDS = 120.0
# A start may check a corpus, load a checkpoint and compile before its first line.
START_SECONDS = 600.0
# So many of the slowest recent step, or of the last validation, may go by without a line.
_STEPS_OF_SILENCE, _VALIDATIONS_OF_SILENCE = 10, 3
# Files of a folder that was copied are as old as one another, but for so much.
_COPY_SECONDS = 5.0


class Health(Enum):
    """Whether a run goes on."""

    DONE = "done"
    RUNNING = "running"
    STALLED = "stalled"
    STOPPED = "stopped"
    FAILED = "failed"
    NOT_STARTED = "not started"


@dataclass(frozen=True, kw_only=True)
class CheckpointStatus:
    """The newest checkpoint."""

    step: int
    saved_at: float
    """Seconds since 1970."""
    damage: str | None
    """What is missing of it, by the sizes of its files; None if nothing."""
    bad_steps: int
    """Steps until then whose loss or gradient was not finite, and which were passed over."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What is known of a run; None where nothing is."""

    run: str
    health: Health
    remark: str
    """Why the health is what it is, where that says more; else empty."""
    step: int
    steps_planned: int | None
    eta_seconds: float | None
    points_per_second: float | None
    step_seconds: float | None
    loss: float | None
    validation_loss: float | None
    validation_step: int | None
    checkpoint: CheckpointStatus | None
    lost_shards: int
    """Shards of the corpus that the run goes on without."""
    restarts: int
    last_end: EndOfStart | None
    """How the newest start that ended did, where a launcher wrote it down."""
    ranks: int | None
    last_sign_at: float | None
    """When the run last wrote anything, in seconds since 1970."""
    looked_at: float

    def to_json_dict(self) -> dict[str, Any]:
        """Return the values as plain JSON; times become ISO 8601 and ages in seconds."""
        values = asdict(self) | {"health": self.health.value}
        looked_at = values.pop("looked_at")
        values["looked_at"] = _iso(looked_at)
        last_sign = values.pop("last_sign_at")
        values["silent_seconds"] = None if last_sign is None else looked_at - last_sign
        if self.checkpoint is not None:
            saved_at = values["checkpoint"].pop("saved_at")
            values["checkpoint"] |= {
                "saved_at": _iso(saved_at),
                "age_seconds": looked_at - saved_at,
                "is_whole": self.checkpoint.damage is None,
            }
        if self.last_end is not None:
            values["last_end"]["time"] = self.last_end.time.isoformat()
        return values


def look_at(run: Path, *, now: float | None = None) -> RunStatus:
    """Say how a run stands. Only reads, and little, however long the run is.

    Args:
        run: its folder.
        now: seconds since 1970; None: by the clock.

    Raises:
        DataError: if it is no folder of a run.
    """
    if not any((run / name).exists() for name in _SIGNS):
        what = f"it has neither {CONFIG_FILE} nor {METRICS_FILE}" if run.is_dir() else "not there"
        raise DataError(
            f"{run}: is no folder of a run ({what}); give what `tsmoe pretrain` or "
            "`tsmoe finetune` was given as run="
        )
    now = time.time() if now is None else now
    tail, ends = read_tail(run / METRICS_FILE), read_ends(run)
    training = _training(run / CONFIG_FILE)
    signs = _signs_of_life(run)
    health, remark = _health(run, tail, ends, signs, now=now)
    planned = number(training.get("steps"))
    checkpoint = _newest_checkpoint(run / CHECKPOINTS_FOLDER)
    step = max(tail.done, checkpoint.step if checkpoint is not None and not tail.steps else 0)
    validation = tail.validation or {}
    return RunStatus(
        run=str(run),
        health=health,
        remark=remark,
        step=step,
        steps_planned=None if planned is None else int(planned),
        eta_seconds=None if health is Health.DONE else _eta(tail, training, step),
        points_per_second=tail.points_per_second,
        step_seconds=median(tail.step_seconds) if tail.step_seconds else None,
        loss=tail.loss,
        validation_loss=number(validation.get("loss/validation")),
        validation_step=int(validation["step"]) + 1 if validation else None,
        checkpoint=checkpoint,
        lost_shards=len(read_lost_shards(run)),
        restarts=sum(end.decision == "restart" for end in ends),
        last_end=ends[-1] if ends else None,
        ranks=tail.ranks,
        last_sign_at=max(signs.values(), default=None),
        looked_at=now,
    )


def silence_allowed(tail: MetricsTail) -> float:
    """Seconds that may go by without a sign of life: by the steps and validation before."""
    slowest = max(tail.step_seconds, default=0.0)
    validation = number((tail.validation or {}).get("speed/validation_seconds")) or 0.0
    return max(
        LEAST_SILENCE_SECONDS,
        _STEPS_OF_SILENCE * slowest + _VALIDATIONS_OF_SILENCE * validation,
    )


def _health(
    run: Path,
    tail: MetricsTail,
    ends: list[EndOfStart],
    signs: Mapping[str, float],
    *,
    now: float,
) -> tuple[Health, str]:
    started = signs.get(LOCK_FILE, 0.0)
    silence = now - max(signs.values(), default=0.0)
    before_start = started - _COPY_SECONDS
    is_starting = now - started < START_SECONDS and signs.get(METRICS_FILE, 0.0) < before_start
    end = ends[-1] if ends and ends[-1].time.timestamp() >= started else None
    # A marker of an earlier start stays until the next one has opened its data, if it ever does.
    is_overtaken = is_starting or (end is not None and end.outcome == "crashed")
    for name, health in ((DONE_MARKER, Health.DONE), (REQUEUE_MARKER, Health.STOPPED)):
        written = _changed(run / name)
        if written is not None and not (is_overtaken and written < before_start):
            return health, "" if health is Health.DONE else "goes on when started again"
    if end is not None:
        if end.decision == "restart":
            return Health.STOPPED, f"waits to be started again: {end.reason}"
        if end.outcome == "crashed":
            return Health.FAILED, end.reason
    if CONFIG_FILE not in signs and not tail.steps:
        if LOCK_FILE not in signs:
            return Health.NOT_STARTED, ""
        is_starting = silence < START_SECONDS
    if is_starting or (not tail.steps and silence < START_SECONDS):
        return Health.RUNNING, "starting"
    allowed = silence_allowed(tail)
    if silence > allowed:
        return Health.STALLED, f"silent for {silence:,.0f} s; {allowed:,.0f} s would be usual"
    return Health.RUNNING, ""


def _signs_of_life(run: Path) -> dict[str, float]:
    """Say when what a running run writes was last changed, by name."""
    checkpoints = run / CHECKPOINTS_FOLDER
    paths = {name: run / name for name in (LOCK_FILE, CONFIG_FILE, METRICS_FILE)}
    paths |= {CHECKPOINTS_FOLDER: checkpoints, LATEST_FILE: checkpoints / LATEST_FILE}
    # A checkpoint that is being written: a large one takes long, and no line comes meanwhile.
    for path in checkpoints.glob(f"{INCOMPLETE_PREFIX}*/*"):
        paths[str(path)] = path
    changed = {name: _changed(path) for name, path in paths.items()}
    return {name: time for name, time in changed.items() if time is not None}


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None  # not there, or no longer


def _newest_checkpoint(folder: Path) -> CheckpointStatus | None:
    for path in step_folders(folder)[::-1]:
        saved_at = _changed(path / META_FILE) or _changed(path)
        if saved_at is None:
            continue  # was removed meanwhile
        bad_steps = 0
        try:
            meta = read_meta(path)
            damage, bad_steps = find_missing_bytes(path, meta), len(meta.not_finite)
        except CheckpointError:
            damage = f"{META_FILE} cannot be read"
        step = int(path.name.rpartition("_")[2])
        return CheckpointStatus(step=step, saved_at=saved_at, damage=damage, bad_steps=bad_steps)
    return None


def _eta(tail: MetricsTail, training: Mapping[str, Any], step: int) -> float | None:
    """Seconds that are left at the speed of the newest steps, with validation in between."""
    steps, every = number(training.get("steps")), number(training.get("validate_every_steps"))
    if steps is None or not tail.step_seconds:
        return None
    seconds = median(tail.step_seconds)
    validation = number((tail.validation or {}).get("speed/validation_seconds"))
    if validation is not None and every:
        seconds += validation / every
    return max(0.0, steps - step) * seconds


def _training(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    training = values.get("training") if isinstance(values, dict) else None
    return training if isinstance(training, dict) else {}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
