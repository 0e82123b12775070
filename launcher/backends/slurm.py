"""SLURM: one batch job for each command; what runs in it stands in `batch_script`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.batch_script import batch_script
from launcher.containers import AnyContainer
from launcher.errors import LaunchError
from launcher.plan import Job, PlannedStart
from launcher.section import LaunchSection

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_JOB_NUMBER = re.compile(r"(\d+)(?:;\S+)?")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig(LaunchSection):
    """Submit to a SLURM queue by sbatch."""

    type: Literal["slurm"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: tuple[str, ...] = ()
    """Machines not to use."""
    time_limit: str | None = None
    """As sbatch takes it, such as 24:00:00 or 2-00:00:00; None: the partition's."""
    memory: str | None = None
    """Of each machine, such as 200G; 0 is all of it."""
    gpus_per_node: int | None = None
    """None: none is asked for."""
    cpus_per_node: int | None = None
    """None: all of an exclusive machine, else what the partition gives."""
    is_exclusive: bool = True
    """Whole machines; devices and cores are shared with nobody."""
    least_nodes: int | None = None
    """Go on with fewer machines than `nodes`, down to these, where the queue has no more."""
    starts: Literal["node", "rank"] = "node"
    """srun starts DeepSpeed's launcher once on each `node`, or each `rank` by itself."""
    binds_cores: bool = False
    """Give each rank cores of its own by numactl, which the machines need then."""
    stop_signal: Literal["USR1", "TERM"] = "USR1"
    """What SLURM sends before the time limit; USR1 disturbs the fewest libraries."""
    stop_seconds_before: int = 300
    """How long before the time limit; more than a step and a save take."""
    container: AnyContainer | None = None
    before: tuple[str, ...] = ()
    """Lines of the shell at the start of the job, such as `module load cuda`."""
    options: tuple[str, ...] = ()
    """More options of sbatch, such as --mail-user=me@example.org."""

    is_queued = True

    def __post_init__(self) -> None:
        if self.stop_seconds_before < 1:
            raise ValueError(f"stop_seconds_before ({self.stop_seconds_before}) must be at least 1")
        if self.time_limit is not None:
            seconds = limit_seconds(self.time_limit)
            if seconds <= self.stop_seconds_before:
                raise ValueError(
                    f"backend.time_limit ({self.time_limit}, {seconds} s) must be longer than "
                    f"backend.stop_seconds_before ({self.stop_seconds_before} s)"
                )
        if bad := [text for text in self.options if not text.startswith("-") or "\n" in text]:
            raise ValueError(f"backend.options: {bad[0]!r} is no option of sbatch")

    def check(self, spec: LaunchSpec) -> None:
        """Refuse counts that do not fit one another."""
        if self.least_nodes is not None and not 1 <= self.least_nodes <= spec.nodes:
            raise ValueError(
                f"backend.least_nodes ({self.least_nodes}) must be from 1 to nodes ({spec.nodes})"
            )
        if self.gpus_per_node is not None and self.gpus_per_node < spec.ranks_per_node:
            raise ValueError(
                f"backend.gpus_per_node ({self.gpus_per_node}) is less than ranks_per_node "
                f"({spec.ranks_per_node}); each rank needs a GPU of its own"
            )

    def plan(self, spec: LaunchSpec, job: Job, *, python: str) -> PlannedStart:
        """Write the batch script of a job and say how it is submitted."""
        if self.container is not None and spec.python is None:
            python = "python"
        folder = Path(spec.folder)
        script = folder / spec.log_folder / f"{job.name}.sbatch"
        return PlannedStart(
            job=job,
            argv=("sbatch", "--parsable"),
            files={script: batch_script(spec, self, job, python=python)},
            stdin=script,
            folder=folder,
        )


def limit_seconds(text: str) -> int:
    """Turn a time limit of SLURM into seconds: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: if it is none of these.
    """
    match = _TIME_LIMIT.fullmatch(text)
    if match is None:
        raise ValueError(
            f"time_limit {text!r} is not of SLURM's forms, such as 24:00:00 or 2-00:00:00"
        )
    days, first, second, third = (None if part is None else int(part) for part in match.groups())
    assert first is not None
    if days is not None:
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def job_number(printed: str) -> str:
    """Find the job's number in what sbatch printed, whatever a site's wrapper adds to it.

    Raises:
        LaunchError: if there is none.
    """
    for line in reversed(printed.splitlines()):
        words = line.split()
        if words and (match := _JOB_NUMBER.fullmatch(words[-1])):
            return match[1]
    raise LaunchError(
        f"sbatch printed no job number, but {printed.strip()!r}; look with squeue --me whether the "
        "job is there"
    )


def submit(start: PlannedStart, numbers: Mapping[str, str]) -> str:
    """Hand a job to the queue and return its number.

    Args:
        start: with its files already written.
        numbers: of the jobs before it, by name.

    Raises:
        LaunchError: if sbatch refuses, with its words.
    """
    argv = list(start.argv)
    if start.job.after:
        after = ":".join(numbers[name] for name in start.job.after)
        argv += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    assert start.stdin is not None
    try:
        with start.stdin.open(encoding="utf-8") as script:
            done = subprocess.run(
                argv, stdin=script, capture_output=True, text=True, check=False, cwd=start.folder
            )
    except FileNotFoundError as error:
        raise LaunchError(
            "sbatch is not on this machine; run tsmoe launch where SLURM's commands are, such as a "
            "login node"
        ) from error
    if done.returncode:
        raise LaunchError(f"{start.job.name}: sbatch refused: {done.stderr.strip()}")
    return job_number(done.stdout)
