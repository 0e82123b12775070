"""From a launch file and a command to what is started; nothing here touches a machine."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.errors import LaunchError

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

# Commands whose processes talk to one another: started once for each rank. All others run once.
RANKED_COMMANDS = ("pretrain", "finetune", "preflight")
# Of those, the ones that leave a run folder with markers and checkpoints.
TRAINING_COMMANDS = ("pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command of a launch, with the machines it gets."""

    name: str
    command: tuple[str, ...]
    """Words that follow `tsmoe`."""
    run: str | None
    """Run folder of a command that trains, absolute."""
    node_counts: tuple[int, ...]
    """On how many machines it can run, most first; only a queue may give fewer than the most."""
    ranks_per_node: int
    array: int | None = None
    after: tuple[str, ...] = ()

    @property
    def nodes(self) -> int:
        """Machines that it asks for."""
        return self.node_counts[0]

    @property
    def is_ranked(self) -> bool:
        """Whether its processes talk to one another."""
        return self.command[0] in RANKED_COMMANDS

    @property
    def world_size(self) -> int | None:
        """Processes that talk to one another; None of a command that runs once."""
        return self.nodes * self.ranks_per_node if self.is_ranked else None


@dataclass(frozen=True, kw_only=True)
class PlannedStart:
    """What is executed, or handed to a queue, for one job."""

    job: Job
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of the launching process."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """Files to write first, by path."""
    stdin: Path | None = None
    """The file that `argv` reads."""
    hosts: tuple[str, ...] = ()
    """Machines that it reaches from here; none where it is this one, or the queue's choice."""
    folder: Path = Path()
    """Where it runs."""


def jobs_of(
    spec: LaunchSpec, command: Sequence[str], run_of: Callable[[Sequence[str]], str | None]
) -> list[Job]:
    """List the jobs of a launch in an order in which they can be started.

    Args:
        spec: of the launch.
        command: words after `tsmoe`; empty where the launch file has stages.
        run_of: says where a command that trains has its run folder.

    Raises:
        LaunchError: if there is no command, or one beside stages.
    """
    if bool(command) == bool(spec.stages):
        if command:
            raise LaunchError(
                f"the launch file has stages ({', '.join(s.name for s in spec.stages)}) and a "
                f"command is given too ({command[0]}); leave one of them out"
            )
        raise LaunchError("no command; give it after --, such as: -- pretrain time_tracker_tiny")
    if command:
        return [_job(spec, spec.name, tuple(command), run_of)]
    return [
        _job(
            spec,
            f"{spec.name}-{stage.name}",
            stage.command,
            run_of,
            nodes=stage.nodes,
            ranks_per_node=stage.ranks_per_node,
            array=stage.array,
            after=tuple(f"{spec.name}-{name}" for name in stage.after),
        )
        for stage in spec.stages
    ]


def _job(
    spec: LaunchSpec,
    name: str,
    command: tuple[str, ...],
    run_of: Callable[[Sequence[str]], str | None],
    *,
    nodes: int | None = None,
    ranks_per_node: int | None = None,
    array: int | None = None,
    after: tuple[str, ...] = (),
) -> Job:
    is_ranked = command[0] in RANKED_COMMANDS
    if not is_ranked and (nodes or 1) > 1:
        raise LaunchError(f"{name}: nodes is {nodes}, but `{command[0]}` runs as one process")
    most = (nodes or spec.nodes) if is_ranked else 1
    if not spec.backend.is_queued and most > spec.nodes:
        raise LaunchError(f"{name}: nodes is {most}, but the launch has {spec.nodes} machine(s)")
    least = spec.backend.least_nodes if spec.backend.type == "slurm" else None
    return Job(
        name=name,
        command=command,
        run=run_of(command) if command[0] in TRAINING_COMMANDS else None,
        node_counts=tuple(range(most, min(least or most, most) - 1, -1)),
        ranks_per_node=(ranks_per_node or spec.ranks_per_node) if is_ranked else 1,
        array=array,
        after=after,
    )


def plan(spec: LaunchSpec, jobs: Sequence[Job], *, python: str) -> list[PlannedStart]:
    """Say for each job what is started, in the order of jobs.

    Args:
        spec: of the launch.
        jobs: as `jobs_of` gives them.
        python: interpreter on the machines, where the launch file names none.
    """
    return [spec.backend.plan(spec, job, python=spec.python or python) for job in jobs]


def as_text(starts: Sequence[PlannedStart]) -> str:
    """Write a plan down as it would be typed, with the files that are written first."""
    parts = []
    for start in starts:
        parts.append(f"# {start.job.name}: in {start.folder}")
        for path, text in start.files.items():
            parts.append(f"# file {path}:\n{text.rstrip()}\n# end of {path}")
        words = [f"{key}={shlex.quote(value)}" for key, value in start.environment.items()]
        words += [shlex.quote(word) for word in start.argv]
        if start.job.after:
            words.append(f"# after {', '.join(start.job.after)}")
        if start.stdin is not None:
            words.insert(
                len(start.environment) + len(start.argv), f"< {shlex.quote(str(start.stdin))}"
            )
        parts.append(" ".join(words))
    return "\n".join(parts)
