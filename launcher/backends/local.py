"""This machine: one process, or as many ranks as it has devices under torchrun."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.environment import rank_variables
from launcher.plan import Job, PlannedStart
from launcher.section import LaunchSection

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec


@dataclass(frozen=True, kw_only=True)
class LocalConfig(LaunchSection):
    """Start on this machine, under torchrun where there is more than one rank."""

    type: Literal["local"] = "local"

    is_queued = False

    def check(self, spec: LaunchSpec) -> None:
        """Refuse what one machine cannot be."""
        if spec.nodes > 1:
            raise ValueError(
                f"nodes is {spec.nodes}, but backend local is this machine; use backend slurm, "
                "deepspeed or accelerate, or nodes: 1"
            )

    def plan(self, spec: LaunchSpec, job: Job, *, python: str) -> PlannedStart:
        """Say what is started for a job."""
        start = [python, "-m", "tsmoe"]
        if job.is_ranked and job.ranks_per_node > 1:
            start = [
                python, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", str(job.ranks_per_node), "-m", "tsmoe",
            ]  # fmt: skip
        return PlannedStart(
            job=job,
            argv=(*start, *job.command),
            environment=rank_variables(spec, world_size=job.world_size),
            folder=Path(spec.folder),
        )
