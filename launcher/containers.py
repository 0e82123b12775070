"""Containers that ranks run in, as options of srun or as words before the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.section import LaunchSection

_JOB_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "DS_ACCELERATOR",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PyxisContainer(LaunchSection):
    """NVIDIA's pyxis and enroot: srun starts the container itself."""

    type: Literal["pyxis"] = "pyxis"
    image: str
    """Such as registry.example.org#team/tsmoe:1.0, or a .sqsh file."""
    mounts: tuple[str, ...] = ()
    """Folders as HERE:THERE; those of data and runs."""

    def srun_options(self, folder: str) -> list[str]:
        """Return options of srun."""
        mounts = ",".join((f"{folder}:{folder}", *self.mounts))
        return [
            f"--container-image={self.image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={folder}",
            "--no-container-mount-home",
        ]

    def words(self, folder: str, variables: Sequence[str]) -> list[str]:
        """Return nothing: srun starts the container."""
        del folder, variables
        return []


@dataclass(frozen=True, kw_only=True)
class ApptainerContainer(LaunchSection):
    """Apptainer, formerly Singularity."""

    type: Literal["apptainer"] = "apptainer"
    image: str
    """A .sif file or docker://NAME."""
    mounts: tuple[str, ...] = ()
    shows_gpus: bool = True
    """Give the container the machine's NVIDIA devices (--nv)."""

    def srun_options(self, folder: str) -> list[str]:
        """Return nothing: the container is started by the command."""
        del folder
        return []

    def words(self, folder: str, variables: Sequence[str]) -> list[str]:
        """Return the words before the command; variables are seen in it by themselves."""
        del variables
        binds = [
            word for mount in (f"{folder}:{folder}", *self.mounts) for word in ("--bind", mount)
        ]
        gpus = ["--nv"] if self.shows_gpus else []
        return ["apptainer", "exec", *gpus, "--pwd", folder, *binds, self.image]


@dataclass(frozen=True, kw_only=True)
class DockerContainer(LaunchSection):
    """Docker or podman on the machines; one container for each node."""

    type: Literal["docker"] = "docker"
    image: str
    mounts: tuple[str, ...] = ()
    program: Literal["docker", "podman"] = "docker"
    handed_in: tuple[str, ...] = _JOB_VARIABLES
    """Variables of the machine that the container sees too, beside those of `environment`."""
    shows_gpus: bool = True
    """Give the container the machine's NVIDIA devices (--gpus all)."""

    def srun_options(self, folder: str) -> list[str]:
        """Return nothing: the container is started by the command."""
        del folder
        return []

    def words(self, folder: str, variables: Sequence[str]) -> list[str]:
        """Return the words before the command; variables are handed in by name."""
        mounts = [word for m in (f"{folder}:{folder}", *self.mounts) for word in ("--volume", m)]
        gpus = ["--gpus", "all"] if self.shows_gpus else []
        names = dict.fromkeys((*self.handed_in, *variables))
        handed_in = [word for name in names for word in ("--env", name)]
        return [
            self.program, "run", "--rm", "--network", "host", "--ipc", "host", "--init", *gpus,
            "--user", "$(id -u):$(id -g)", "--workdir", folder, *mounts, *handed_in,
            "--entrypoint", "", self.image,
        ]  # fmt: skip


AnyContainer = PyxisContainer | ApptainerContainer | DockerContainer
