"""Decide what follows when a start of a training ended: done, start it again, or give up.

A run folder tells how it stands by markers and its newest checkpoint, and keeps one line for each
start in restarts.jsonl. Exit codes count little: launchers lose them, and a node that died gave
none. Batch scripts call this module before and after the ranks; `tsmoe launch` uses it directly.

    python -m launcher.supervise begin --run RUN
    python -m launcher.supervise end --run RUN --code 1     # exits 0: done, 75: start it again
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from launcher.errors import LaunchError
from launcher.section import LaunchSection

DONE, REQUEUE, LOCK = "DONE", "REQUEUE", ".lock"
STOP_NOTE = "STOP"
"""A file of this name in a run folder asks the run to save and end, and not to be started again;
one that holds `requeue` asks for the end alone."""
HISTORY, CURRENT = "restarts.jsonl", ".start.json"
START_AGAIN = 75
# A wrong setting, bad data: at the first start the same words would meet the same end. Once there
# was progress they were right, and what stands in the way may pass, such as ranks of a lost node
# that linger, or a store that does not answer.
_MISTAKES = (2, 3)
# A file system without locks, on which nobody can hold one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@dataclass(frozen=True, kw_only=True)
class RestartConfig(LaunchSection):
    """When a training that ended before its last step is started again."""

    most: int = 100
    """Restarts of one run in all, since it was last begun by hand."""
    most_without_progress: int = 5
    """Restarts one after the other that brought no newer checkpoint. More than one or two, as a
    node that returns may be sent what ended its former start once more."""

    def __post_init__(self) -> None:
        if self.most < 0 or self.most_without_progress < 0:
            raise ValueError(
                f"most ({self.most}) and most_without_progress ({self.most_without_progress}) "
                "must be at least 0; 0 means never"
            )


@dataclass(frozen=True, kw_only=True)
class StartRecord:
    """What one start of a run came to; a line of restarts.jsonl."""

    time: str
    job: str | None
    restart: int
    """Starts before it that belong to the same launch."""
    exit_code: int | None
    """None: nobody was left to say, as when a machine went down."""
    outcome: Literal["done", "stopped", "crashed"]
    step_before: int
    step: int
    """Of the newest checkpoint, 0 if there is none."""
    nodes: list[str]
    decision: Literal["none", "restart", "give_up"]
    reason: str


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    steps = [
        int(match[1])
        for path in (run / "checkpoints").glob("step_*")
        if (match := re.fullmatch(r"step_(\d{8})", path.name))
    ]
    return max(steps, default=0)


def read_history(run: Path) -> list[StartRecord]:
    """Return the starts so far; a line that a kill cut short is left out."""
    try:
        lines = (run / HISTORY).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(StartRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return records


def begin(run: Path, *, job: str | None, restart: int, limits: RestartConfig) -> None:
    """Take note that the run starts now; every start needs it, and `end` after it.

    A start before it that has no end is recorded as crashed: its machine went down, or the queue
    took it away.

    Args:
        run: folder.
        job: number of the job in the queue, if there is one.
        restart: how often this launch was started before.
        limits: on starting again.

    Raises:
        LaunchError: if too many starts brought nothing, the run goes on already, or somebody has
            asked for its end since the start before.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{run}: the run folder cannot be made ({error.strerror})") from error
    if not restart and _is_held(run):
        raise LaunchError(
            f"{run}: a process is training there; wait for it, or stop it: touch {run}/{STOP_NOTE}"
        )
    current = run / CURRENT
    if current.exists():
        call_off = None if restart else "launched again by hand"
        _close(run, exit_code=None, nodes=[], limits=limits, call_off=call_off)
    if restart and (reason := _spent(read_history(run), limits, restart)):
        raise LaunchError(f"{run}: not started again: {reason}")
    if restart and _is_final(run / STOP_NOTE):
        raise LaunchError(
            f"{run}: not started again: the note {STOP_NOTE} is there; `tsmoe launch` goes on"
        )
    (run / STOP_NOTE).unlink(missing_ok=True)
    started = {
        "job": job,
        "restart": restart,
        "step": newest_step(run),
        "markers": _markers(run),
    }
    try:
        _write(current, json.dumps(started))
    except OSError as error:
        raise LaunchError(f"{current}: cannot be written ({error.strerror})") from error


def end(
    run: Path,
    *,
    exit_code: int,
    nodes: Sequence[str] = (),
    limits: RestartConfig,
    is_cancelled: bool = False,
) -> StartRecord:
    """Take note that a start of the run ended, and decide what follows.

    Args:
        run: folder.
        exit_code: of what started the ranks.
        nodes: machines that took part.
        limits: on starting again.
        is_cancelled: somebody took its job out of the queue, which is no reason to start again.
    """
    call_off = "its job was cancelled" if is_cancelled else None
    return _close(run, exit_code=exit_code, nodes=list(nodes), limits=limits, call_off=call_off)


def decide(
    *,
    outcome: Literal["done", "stopped", "crashed"],
    exit_code: int | None,
    step_before: int,
    step: int,
    history: Sequence[StartRecord],
    limits: RestartConfig,
    restart: int,
) -> tuple[Literal["none", "restart", "give_up"], str]:
    """Say whether a run is to be started again, and why.

    Args:
        outcome: of the start that ended.
        exit_code: of it.
        step_before: of the newest checkpoint when it began.
        step: of the newest checkpoint now.
        history: starts before it.
        limits: on starting again.
        restart: starts of this launch before it.
    """
    if outcome == "done":
        return "none", f"done at step {step}"
    if outcome == "crashed" and exit_code in _MISTAKES and restart == 0 and step <= step_before:
        return "give_up", f"exit code {exit_code}: a mistake that the same command would repeat"
    if restart >= limits.most:
        return "give_up", f"started again {restart} times already (restarts.most)"
    what = "stopped on request" if outcome == "stopped" else f"crashed ({_code(exit_code)})"
    if step > step_before:
        return "restart", f"{what} at step {step}, {step - step_before} further than before"
    idle = 1 + _idle_starts(history, restart)
    if idle > limits.most_without_progress:
        return "give_up", (
            f"{what}: {idle} starts one after the other left the newest checkpoint at step {step} "
            "(restarts.most_without_progress); save more often or look at the log"
        )
    return "restart", f"{what} at step {step} without progress ({idle} of such starts)"


def _close(
    run: Path,
    *,
    exit_code: int | None,
    nodes: list[str],
    limits: RestartConfig,
    call_off: str | None = None,
) -> StartRecord:
    """Write down how the start at hand ended, and why it is not started again if it is not."""
    current = run / CURRENT
    try:
        started: dict[str, Any] = json.loads(current.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        started = {"job": None, "restart": 0, "step": 0, "markers": {}}
    is_new = {name for name, time in _markers(run).items() if started["markers"].get(name) != time}
    outcome: Literal["done", "stopped", "crashed"] = "crashed"
    if DONE in is_new:
        outcome = "done"
    elif REQUEUE in is_new:
        outcome = "stopped"
    step, history = newest_step(run), read_history(run)
    decision, reason = decide(
        outcome=outcome,
        exit_code=exit_code,
        step_before=started["step"],
        step=step,
        history=history,
        limits=limits,
        restart=started["restart"],
    )
    if call_off is None and _is_final(run / STOP_NOTE):
        call_off = f"the note {STOP_NOTE} is there"
    if outcome != "done" and call_off is not None:
        decision, reason = "none", f"{outcome} at step {step}, and {call_off}"
    record = StartRecord(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        job=started["job"],
        restart=started["restart"],
        exit_code=exit_code,
        outcome=outcome,
        step_before=started["step"],
        step=step,
        nodes=nodes,
        decision=decision,
        reason=reason,
    )
    try:
        with (run / HISTORY).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")
    except OSError as error:  # a full disk: what was decided holds
        print(f"tsmoe launch: {run / HISTORY}: {error.strerror}; {reason}", file=sys.stderr)
    current.unlink(missing_ok=True)
    return record


def _spent(history: Sequence[StartRecord], limits: RestartConfig, restart: int) -> str | None:
    """Say why the starts so far are enough, or None."""
    idle = _idle_starts(history, restart)
    if idle > limits.most_without_progress:
        return (
            f"{idle} starts one after the other brought no newer checkpoint "
            "(restarts.most_without_progress); start it by hand when the cause is mended"
        )
    return None


def _idle_starts(history: Sequence[StartRecord], restart: int) -> int:
    """Count this launch's newest starts one after the other that brought no newer checkpoint."""
    count = 0
    for record in reversed(history[len(history) - min(restart, len(history)) :]):
        if record.outcome == "done" or record.step > record.step_before:
            break
        count += 1
        if record.restart == 0:
            break
    return count


def _markers(run: Path) -> dict[str, int]:
    """When each marker was written; one that an earlier start left does not count for this one."""
    found = {}
    for name in (DONE, REQUEUE):
        try:
            found[name] = (run / name).stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def _is_held(run: Path) -> bool:
    """Whether a rank holds the run folder; of a restart one that lingers may, for a while."""
    try:
        stream = (run / LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{run / LOCK}: cannot be opened ({error.strerror})") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise LaunchError(f"{run / LOCK}: cannot be locked ({error.strerror})") from error
    return False


def _is_final(note: Path) -> bool:
    try:
        return note.read_text(encoding="utf-8").strip() != "requeue"
    except FileNotFoundError:
        return False


def _code(exit_code: int | None) -> str:
    if exit_code is None:
        return "no exit code: the machine or the job was lost"
    return f"exit code {exit_code}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def main(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    """Run `begin` or `end` for a batch script; returns 0, 75 (start again) or the ranks' code."""
    parser = argparse.ArgumentParser(prog="launcher.supervise", description=__doc__)
    parser.add_argument("action", choices=("begin", "end"))
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--code", type=int, help="exit code of what started the ranks")
    parser.add_argument("--nodes", default="", help="machines, as a,b")
    parser.add_argument("--cancelled", action="store_true", help="its job was cancelled")
    parser.add_argument("--most", type=int, default=RestartConfig.most)
    parser.add_argument(
        "--most-without-progress", type=int, default=RestartConfig.most_without_progress
    )
    args = parser.parse_args(arguments)
    limits = RestartConfig(most=args.most, most_without_progress=args.most_without_progress)
    if args.action == "begin":
        try:
            begin(
                args.run,
                job=environment.get("SLURM_JOB_ID"),
                restart=int(environment.get("SLURM_RESTART_COUNT", "0")),
                limits=limits,
            )
        except LaunchError as error:
            print(f"tsmoe launch: {error}", file=sys.stderr)
            return 1
        return 0
    record = end(
        args.run,
        exit_code=args.code,
        nodes=[name for name in args.nodes.split(",") if name],
        limits=limits,
        is_cancelled=args.cancelled,
    )
    print(f"tsmoe launch: {args.run}: {record.decision}: {record.reason}", file=sys.stderr)
    if record.decision == "restart":
        return START_AGAIN
    return 0 if record.outcome == "done" else args.code or 1


if __name__ == "__main__":
    sys.exit(main())
