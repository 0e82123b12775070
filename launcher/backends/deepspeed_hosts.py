"""Machines that are reached by ssh, under the deepspeed launcher and its host file."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launcher.backends.hosts import check_hosts
from launcher.environment import rank_variables
from launcher.errors import LaunchError
from launcher.plan import Job, PlannedStart
from launcher.section import LaunchSection

if TYPE_CHECKING:
    from launcher.spec import LaunchSpec

# What DeepSpeed does not quote.
_PLAIN = re.compile(r"[\w@%+=:,./-]*")


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
            # DeepSpeed hands no other variables on.
            exported: "".join(f"{k}={self._for_shell(k, v)}\n" for k, v in variables.items()),
        }
        argv = (
            # A single machine, too, is the one that is named, not this one.
            self.program, "--force_multi",
            "--hostfile", str(hostfile), "--launcher", self.ssh_launcher,
            "--master_addr", self.hosts[0], "--master_port", str(self.master_port),
            *self.options,
            "--module", "tsmoe",
            *(map(self._word, job.command) if self.ssh_launcher == "pdsh" else job.command),
        )  # fmt: skip
        return PlannedStart(
            job=job,
            argv=argv,
            environment=variables | {"DS_ENV_FILE": str(exported.absolute())},
            files=files,
            folder=folder,
            hosts=self.hosts[: job.nodes],
        )

    @staticmethod
    def _word(word: str) -> str:
        """Quote a word for pdsh, which joins all to a command of a shell on the other machines."""
        # DeepSpeed puts what has a space into double quotes, and spares those in it.
        return _in_double_quotes(word) if " " in word else shlex.quote(word)

    def _for_shell(self, name: str, value: str) -> str:
        """Write a variable as DeepSpeed wants it, which hands it to a shell for pdsh alone."""
        if "\n" in value or value != value.strip():
            raise LaunchError(
                f"environment.{name} is {value!r}; DeepSpeed hands no line breaks on, and no "
                "spaces at an end"
            )
        if self.ssh_launcher != "pdsh" or _PLAIN.fullmatch(value):
            return value
        # DeepSpeed puts it into double quotes.
        return _in_double_quotes(value).replace('"', '\\"')


def _in_double_quotes(text: str) -> str:
    """Escape what a shell would fill in between double quotes, but for these themselves."""
    return re.sub(r"[\\$`]", r"\\\g<0>", text)
