"""The processes of a run, and the collectives between them; with one process everything is local.

`Ranks` stands for the whole world or for a group of it. Nothing else of the product asks
torch.distributed who it is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tsmoe.errors import ConfigError

DEFAULT_TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A group of processes and this process' place in it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    """Handle of torch.distributed (it has no public type); None means the whole world."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place; every rank of the group must call it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """Collect one small plain value of each rank, in rank order; every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_to_all(self, rows: Tensor, *, send: Iterable[int], receive: Iterable[int]) -> Tensor:
        """Send consecutive rows to each rank and return what came, in rank order.

        Args:
            rows: any dtype; the first `send[0]` rows go to rank 0, and so on.
            send: rows for each rank.
            receive: rows that each rank has for this one.
        """
        receive = list(receive)
        got = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(
            got,
            rows.contiguous(),
            output_split_sizes=receive,
            input_split_sizes=list(send),
            group=self.group,
        )
        return got


def launched_world_size() -> int:
    """Processes that the launcher started, before any of them has joined the others."""
    _map_slurm_variables()
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(*, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, device: str = "auto") -> Ranks:
    """Join the processes that a launcher (deepspeed, torchrun, accelerate, srun) started.

    Collective: every rank must call it. Communicates by gloo on CPU and NCCL on GPUs; a collective
    that waits for a lost rank fails after `timeout_seconds` instead of hanging.

    Raises:
        ConfigError: if the launcher's variables are incomplete.
    """
    _map_slurm_variables()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch_device = _choose_device(device, local_rank)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks(device=torch_device)
    if torch_device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each rank of this machine takes all cores, and they get in one another's way.
        neighbours = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(neighbours)))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {size} but {', '.join(missing)} is not set; start the ranks with "
            "deepspeed, torchrun or accelerate, or export the missing variables"
        )
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch_device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
        )
    return Ranks(
        rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=torch_device
    )


def stop() -> None:
    """Leave the group; harmless with one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _map_slurm_variables() -> None:
    # Bare srun sets no RANK; DeepSpeed knows no SLURM names, would look for MPI and fail.
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ:
        return
    for ours, slurm in (
        ("RANK", "SLURM_PROCID"),
        ("LOCAL_RANK", "SLURM_LOCALID"),
        ("WORLD_SIZE", "SLURM_NTASKS"),
    ):
        if slurm in os.environ:
            os.environ[ours] = os.environ[slurm]


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda":
        count = torch.cuda.device_count()
        if count == 1 and "SLURM_STEP_ID" in os.environ:
            local_rank = 0  # SLURM shows each task its own GPU only
        if local_rank >= count:
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: this machine shows {count}; "
                "start at most one rank per GPU, or set training.device=cpu"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if wanted != "cpu":
        raise ConfigError(f"device is {wanted!r}; use auto, cpu or cuda")
    return torch.device("cpu")
