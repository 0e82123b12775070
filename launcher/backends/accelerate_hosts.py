"""The accelerate launcher: on this machine, or one command on each of several by ssh."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.backends.hosts import check_hosts
from launcher.environment import rank_variables
from launcher.plan import Job, PlannedStart
from launcher.section import LaunchSection

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec


@dataclass(frozen=True, kw_only=True)
class AccelerateConfig(LaunchSection):
    """Start by `accelerate launch`, for the plain engine and for DeepSpeed alike."""

    type: Literal["accelerate"] = "accelerate"
    hosts: tuple[str, ...] = ()
    """Names of the machines, reached by ssh without a password; none: this machine."""
    master_port: int = 29500

    is_queued = False

    def check(self, spec: LaunchSpec) -> None:
        """Refuse counts that are not those of the hosts."""
        check_hosts(self.hosts, spec.nodes)

    def plan(self, spec: LaunchSpec, job: Job, *, python: str) -> PlannedStart:
        """Say what is started for a job; commands of one process start on this machine."""
        hosts: tuple[str, ...] = ()
        variables, folder = rank_variables(spec, world_size=job.world_size), Path(spec.folder)
        world_size = job.nodes * job.ranks_per_node
        if not job.is_ranked or world_size == 1:
            argv: tuple[str, ...] = (python, "-m", "tsmoe", *job.command)
        elif not self.hosts:
            argv = tuple(self._launch(job, python, machine=0, address="127.0.0.1"))
        else:
            hosts = self.hosts[: job.nodes]
            commands = [
                self._on_host(
                    host,
                    folder,
                    variables,
                    self._launch(job, python, machine=number, address=self.hosts[0]),
                )
                for number, host in enumerate(hosts)
            ]
            argv = (python, "-m", "launcher.together", *commands)
        return PlannedStart(job=job, argv=argv, environment=variables, folder=folder, hosts=hosts)

    def _launch(self, job: Job, python: str, *, machine: int, address: str) -> list[str]:
        return [
            # Several processes, also without GPUs: with --cpu it would start one.
            python, "-m", "accelerate.commands.launch", "--multi_gpu",
            "--num_machines", str(job.nodes),
            "--num_processes", str(job.nodes * job.ranks_per_node),
            "--machine_rank", str(machine),
            "--main_process_ip", address, "--main_process_port", str(self.master_port),
            "--mixed_precision", "no", "--dynamo_backend", "no",
            "--module", "tsmoe", *job.command,
        ]  # fmt: skip

    @staticmethod
    def _on_host(host: str, folder: Path, variables: dict[str, str], command: list[str]) -> str:
        settings = [f"{key}={value}" for key, value in variables.items()]
        there = f"cd {shlex.quote(str(folder.absolute()))} && exec "
        there += shlex.join(["env", *settings, *command] if settings else command)
        return shlex.join(["ssh", "-o", "BatchMode=yes", host, there])
