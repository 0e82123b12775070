"""What `launch.yaml` holds: on which machines a command runs, and how it is started again.

The file says nothing of models or data: those stand in the command's own preset. It is decoded by
the command line; this package only declares it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.backends import AnyBackend, LocalConfig
from launcher.section import LaunchSection
from launcher.supervise import RestartConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig(LaunchSection):
    """One command of a chain, such as build -> pretrain -> finetune -> evaluate."""

    name: str
    command: tuple[str, ...]
    """Words that follow `tsmoe`, such as [pretrain, time_tracker_base, run=runs/base]."""
    after: tuple[str, ...] = ()
    """Names of stages that must have succeeded; those without any start at once."""
    nodes: int | None = None
    """Machines; None: those of the launch file, and one for a command that runs once."""
    ranks_per_node: int | None = None
    array: int | None = None
    """Tasks of a job array that share the work of `data build`; each gets `--task I/N`."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError(
                f"stage {self.name}: command is empty; give words such as [pretrain, ..]"
            )
        for name in ("nodes", "ranks_per_node", "array"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"stage {self.name}: {name} ({value}) must be at least 1")
        if self.array is not None and self.command[:2] != ("data", "build"):
            raise ValueError(
                f"stage {self.name}: array ({self.array}) is for `data build`, whose tasks share "
                f"the work, and command is {' '.join(self.command[:2])!r}"
            )


@dataclass(frozen=True, kw_only=True)
class LaunchSpec(LaunchSection):
    """Everything that a launch is determined by, beside the command itself."""

    backend: AnyBackend = field(default_factory=LocalConfig)
    name: str = "tsmoe"
    """Of the job and of its files in `log_folder`."""
    nodes: int = 1
    """Machines of a command that trains."""
    ranks_per_node: int = 1
    """Processes of a machine; one for each GPU."""
    folder: str = "."
    """Where the command runs; relative paths of the command start here."""
    log_folder: str = "logs"
    """What the ranks print, and the job scripts; relative to `folder`."""
    python: str | None = None
    """Interpreter on the machines; None: the one that runs `tsmoe launch`, and `python` in
    containers."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that every rank gets, such as {NCCL_DEBUG: WARN}."""
    network_interface: str | None = None
    """Where ranks talk to one another, such as ib0; None: left to NCCL; gloo takes the one that
    leads to the first machine."""
    local_scratch: str | None = None
    """Folder on each machine's own disk for the cache of remote corpora and compiled kernels;
    variables of the shell are filled in there."""
    threads_per_rank: int | None = None
    """OMP_NUM_THREADS; None: the cores of a machine by its ranks."""
    restarts: RestartConfig = field(default_factory=RestartConfig)
    stages: tuple[StageConfig, ...] = ()
    """A chain of commands; then none is given on the command line."""

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.threads_per_rank is not None and self.threads_per_rank < 1:
            raise ValueError(f"threads_per_rank ({self.threads_per_rank}) must be at least 1")
        if bad := [key for key in self.environment if not key.isidentifier()]:
            raise ValueError(f"environment: {bad[0]!r} is no name of a variable")
        if any(sign in self.name for sign in "/\n\"'") or not self.name:
            raise ValueError(f"name ({self.name!r}) becomes a part of file names; use letters")
        self.backend.check(self)
        self._check_stages()

    def _check_stages(self) -> None:
        before: list[str] = []
        for stage in self.stages:
            if stage.name in before:
                raise ValueError(f"stages: the name {stage.name} is given twice")
            for needed in stage.after:
                if needed not in before:
                    known = ", ".join(before) or "none"
                    raise ValueError(
                        f"stages: {stage.name} comes after {needed}, which is no stage before it "
                        f"(there are: {known})"
                    )
            before.append(stage.name)
