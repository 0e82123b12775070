"""What can be known before anything starts, on the machine that launches; the ranks do the rest.

`tsmoe launch --check` starts `tsmoe preflight` on the very ranks that would train; this module
turns one command into the other, and asks the queue whether it knows what the launch file names.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.backends import SlurmConfig
from launcher.backends.slurm import limit_seconds
from launcher.errors import LaunchError
from launcher.plan import PlannedStart
from launcher.spec import LaunchSpec

_CHECK_TIME_LIMIT = "15"  # minutes
_SECONDS_BETWEEN_LOOKS = 2.0
_MOST_UNANSWERED = 300  # one after the other


def as_check(spec: LaunchSpec, command: Sequence[str]) -> tuple[LaunchSpec, tuple[str, ...]]:
    """Return the launch and the command that check the machines of a training.

    Raises:
        LaunchError: if the command is no training, or there are stages.
    """
    if spec.stages or not command or command[0] != "pretrain":
        raise LaunchError(
            "--check takes the command of a pretraining, such as: -- pretrain time_tracker_base; "
            "of a chain, give that of its stage"
        )
    checked = replace(spec, name=f"{spec.name}-check")
    if isinstance(spec.backend, SlurmConfig):
        # Nothing is saved, so no time is needed for that.
        backend = replace(spec.backend, time_limit=_CHECK_TIME_LIMIT, stop_seconds_before=1)
        checked = replace(checked, backend=backend)
    return checked, ("preflight", *command[1:])


def check_here(spec: LaunchSpec, starts: Sequence[PlannedStart]) -> None:
    """Look at what this machine can tell of a launch.

    Raises:
        LaunchError: naming what is missing.
    """
    for start in starts:
        program = start.argv[0]
        if shutil.which(program) is None:
            hint = (
                "run tsmoe launch where SLURM's commands are, such as a login node"
                if program == "sbatch"
                else "install it, or name the right interpreter by python:"
            )
            raise LaunchError(f"{program} is not on this machine; {hint}")
    if isinstance(spec.backend, SlurmConfig):
        _check_partition(spec.backend, most_nodes=max(start.job.nodes for start in starts))


def _check_partition(slurm: SlurmConfig, *, most_nodes: int) -> None:
    """Ask the queue for the partition, its machines and its time limit."""
    listed = _printed(["sinfo", "--noheader", "--format=%R|%D|%l"])
    partitions = [line.split("|") for line in listed.splitlines() if line.count("|") == 2]
    if slurm.partition is None or not partitions:
        return
    wanted = slurm.partition.split(",")
    known = sorted({name for name, _, _ in partitions})
    for name in wanted:
        if name not in known:
            raise LaunchError(
                f"backend.partition is {name}, which the queue does not have; there are "
                f"{', '.join(known)}"
            )
    counts = {n: sum(int(c) for m, c, _ in partitions if m == n) for n in wanted}
    if (count := max(counts.values())) < (slurm.least_nodes or most_nodes):
        raise LaunchError(
            f"nodes is {most_nodes}, but partition {slurm.partition} has {count} machine(s)"
        )
    limits = {limit for name, _, limit in partitions if name in wanted}
    if slurm.time_limit is None or "infinite" in limits:
        return
    longest = max(limits, key=limit_seconds)
    if limit_seconds(slurm.time_limit) > limit_seconds(longest):
        raise LaunchError(
            f"backend.time_limit is {slurm.time_limit}, but partition {slurm.partition} allows "
            f"{longest}; a run that is stopped goes on by itself, so a shorter one will do"
        )


@dataclass(frozen=True, kw_only=True)
class QueuedResult:
    """How a job of the queue ended."""

    state: str
    exit_code: int
    log: str


def wait_for(number: str, log: Path, *, tell: Callable[[str], None]) -> QueuedResult:
    """Wait for a job of the queue to end, however long it has to wait for its machines.

    Args:
        number: of the job.
        log: what it prints to.
        tell: is told each new state of the job.
    """
    state, unanswered = "", 0
    while True:
        now = _state_in_queue(number)
        unanswered = unanswered + 1 if now is None else 0
        if unanswered > _MOST_UNANSWERED:
            raise LaunchError(
                f"squeue does not answer any more; job {number} may go on, its log is {log}"
            )
        if now == "":
            break
        if now is not None and now != state:
            tell(f"job {number}: {now}")
            state = now
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    shown = _printed(["scontrol", "show", "job", "--oneliner", number])
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    code, _, number_of_signal = fields.get("ExitCode", "1:0").partition(":")
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    failed = int(code) or (128 + int(number_of_signal or 0) if int(number_of_signal or 0) else 0)
    return QueuedResult(state=fields.get("JobState", "UNKNOWN"), exit_code=failed, log=text)


def _state_in_queue(number: str) -> str | None:
    """Return a job's state and the reason; empty if it is there no more, None without an answer."""
    argv = ["squeue", "--noheader", f"--jobs={number}", "--format=%T %r"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else None
    return done.stdout.strip()


def _printed(argv: Sequence[str]) -> str:
    """Return what a command of SLURM printed; nothing if it failed, as for jobs long gone."""
    done = subprocess.run(list(argv), capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else ""
