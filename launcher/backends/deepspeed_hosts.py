"""Machines that are reached by ssh, under the deepspeed launcher and its host file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.backends.hosts import check_hosts
from launcher.environment import rank_variables
from launcher.plan import Job, PlannedStart
from launcher.section import LaunchSection

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig(LaunchSection):
    """Start by the `deepspeed` program; without hosts, on this machine."""

    type: Literal["deepspeed"] = "deepspeed"
    hosts: tuple[str, ...] = ()
    """Names of the machines, the first of which the ranks meet on; ssh must need no password."""
    master_port: int = 29500
    ssh_launcher: Literal["pdsh", "openmpi", "mpich"] = "pdsh"
    """What the deepspeed program reaches other machines by."""
    options: tuple[str, ...] = ()
    """More options of the deepspeed program, such as [--ssh_port, "2222"]."""
    program: str = field(default="deepspeed")
    """Name or path of the program."""

    is_queued = False

    def check(self, spec: LaunchSpec) -> None:
        """Refuse counts that are not those of the hosts."""
        check_hosts(self.hosts, spec.nodes)

    def plan(self, spec: LaunchSpec, job: Job, *, python: str) -> PlannedStart:
        """Say what is started for a job; commands of one process start on this machine."""
        variables = rank_variables(spec, world_size=job.world_size)
        folder = Path(spec.folder)
        if not job.is_ranked:
            argv: tuple[str, ...] = (python, "-m", "tsmoe", *job.command)
            return PlannedStart(job=job, argv=argv, environment=variables, folder=folder)
        if not self.hosts:
            argv = (
                self.program, "--num_accelerators", str(job.ranks_per_node),
                "--master_port", str(self.master_port), *self.options,
                "--module", "tsmoe", *job.command,
            )  # fmt: skip
            return PlannedStart(job=job, argv=argv, environment=variables, folder=folder)
        logs = folder / spec.log_folder
        hostfile, exported = logs / f"{job.name}.hosts", logs / f"{job.name}.environment"
        lines = [f"{host} slots={job.ranks_per_node}" for host in self.hosts[: job.nodes]]
        files = {
            hostfile: "".join(f"{line}\n" for line in lines),
            # DeepSpeed hands no other variables on; it writes them into a shell command.
            exported: "".join(f"{k}={shlex.quote(v)}\n" for k, v in variables.items()),
        }
        argv = (
            self.program, "--hostfile", str(hostfile), "--launcher", self.ssh_launcher,
            "--master_addr", self.hosts[0], "--master_port", str(self.master_port),
            *self.options,
            "--module", "tsmoe",
            # pdsh joins the words to a command of a shell on the other machines.
            *(map(shlex.quote, job.command) if self.ssh_launcher == "pdsh" else job.command),
        )  # fmt: skip
        return PlannedStart(
            job=job,
            argv=argv,
            environment=variables | {"DS_ENV_FILE": str(exported.absolute())},
            files=files,
            folder=folder,
        )
