"""The processes of a run, and the collectives between them; with one process everything is local.

`Ranks` stands for the whole world or for a group of it. Nothing else of the product asks
torch.distributed who it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from tsmoe.errors import ConfigError, TsmoeError

DEFAULT_TIMEOUT_SECONDS = 600

T = TypeVar("T")

CollectiveKind = Literal["all_to_all_counts", "all_to_all", "all_reduce"]


class ExchangeLabel(NamedTuple):
    """Which rows an exchange moves."""

    layer: int
    """Index of the layer in the stack."""
    direction: Literal["to_experts", "from_experts", "gradient_to_experts", "gradient_from_experts"]


@dataclass(frozen=True, kw_only=True)
class CommunicationRecord:
    """What one kind of collective did under one label since the last look."""

    kind: CollectiveKind
    label: ExchangeLabel | None
    """None: of no layer."""
    calls: int
    bytes_out: int
    """Sent to *other* ranks; of an all-reduce what a ring sends, 2 (n - 1) / n of its size."""
    rows_out: int
    """Rows sent to other ranks; 0 where nothing is counted in rows."""
    seconds: float
    """Waited for: wall time on CPU; on CUDA what the compute stream stood still."""


class CommunicationMeter:
    """Adds up what this process sent to others and how long it waited for them.

    On CUDA times are events that `take` reads, and only `take` waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[CollectiveKind, ExchangeLabel | None], list[float]] = {}
        self._events: list[tuple[list[float], torch.cuda.Event, torch.cuda.Event]] = []

    def record(
        self,
        kind: CollectiveKind,
        label: ExchangeLabel | None = None,
        *,
        calls: int = 1,
        bytes_out: int = 0,
        rows_out: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add to the sums of a kind and label."""
        sums = self._sums.setdefault((kind, label), [0, 0, 0, 0.0])
        for place, value in enumerate((calls, bytes_out, rows_out, seconds)):
            sums[place] += value

    @contextmanager
    def waiting(
        self, kind: CollectiveKind, label: ExchangeLabel | None, device: torch.device
    ) -> Iterator[None]:
        """Add the time that the body waits; its call is counted where it is issued."""
        self.record(kind, label, calls=0)
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._sums[kind, label][3] += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((self._sums[kind, label], begin, end))

    def take(self) -> list[CommunicationRecord]:
        """Return the sums and start anew; on CUDA this waits for what has been issued."""
        for sums, begin, end in self._events:
            end.synchronize()
            sums[3] += begin.elapsed_time(end) / 1000
        records = [
            CommunicationRecord(
                kind=kind,
                label=label,
                calls=int(calls),
                bytes_out=int(bytes_out),
                rows_out=int(rows_out),
                seconds=seconds,
            )
            for (kind, label), (calls, bytes_out, rows_out, seconds) in self._sums.items()
        ]
        self._sums, self._events = {}, []
        return records


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A group of processes and this process' place in it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    """Handle of torch.distributed (it has no public type); None means the whole world."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    meter: CommunicationMeter | None = None
    """Told of each collective; None: nothing is measured."""
    wire_dtype: torch.dtype | None = None
    """Type in which rows of activations and gradients travel between ranks; None: their own."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the group, in place; every rank of the group must call it."""
        if self.size > 1:
            with self._waiting("all_reduce", None, tensor.device):
                dist.all_reduce(tensor, group=self.group)
            if self.meter is not None:
                size = tensor.numel() * tensor.element_size()
                share = 2 * (self.size - 1) / self.size
                self.meter.record("all_reduce", bytes_out=round(share * size))
        return tensor

    def swap(self, tensor: Tensor, other: int) -> Tensor:
        """Exchange a tensor with one other rank of the world, which must call it too."""
        received = torch.empty_like(tensor)
        pair = [dist.P2POp(dist.isend, tensor, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(pair):
            work.wait()
        return received

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

    def on_first(self, find: Callable[[], T]) -> T:
        """Let the first rank find a small plain value and tell it to all; every rank must call it.

        Raises:
            TsmoeError: on every rank, what the first one met.
        """
        outcome: T | TsmoeError | None = None
        if self.is_first:
            try:
                outcome = find()
            except TsmoeError as error:
                if self.size == 1:
                    raise
                outcome = error
        outcome = self.gather(outcome)[0]
        if isinstance(outcome, TsmoeError):
            raise outcome
        return cast(T, outcome)

    def exchange_counts(self, counts_E: Tensor, label: ExchangeLabel | None = None) -> Tensor:
        """Send each rank its equal share of the counts; return theirs for this one, by rank."""
        received_E = torch.empty_like(counts_E)
        with self._waiting("all_to_all_counts", label, counts_E.device):
            dist.all_to_all_single(received_E, counts_E, group=self.group)
        if self.meter is not None:
            others = counts_E.numel() * (self.size - 1) // self.size
            bytes_out = others * counts_E.element_size()
            self.meter.record("all_to_all_counts", label, bytes_out=bytes_out)
        return received_E

    def start_all_to_all(
        self,
        rows: Tensor,
        *,
        send: Sequence[int],
        receive: Sequence[int],
        label: ExchangeLabel | None = None,
    ) -> PendingRows:
        """Start to send consecutive rows to each rank; `wait` returns what came, in rank order.

        Every rank of the group must call it, and wait, in the same order.

        Args:
            rows: floating, (rows, .., width); the first `send[0]` go to rank 0, and so on. Numbers
                that accompany rows, one each, travel in their own type and count as bytes only.
            send: rows for each rank.
            receive: rows that each rank has for this one.
            label: what to tell the meter.
        """
        dtype = rows.dtype
        if self.wire_dtype is not None and rows.dim() > 1:
            rows = rows.to(self.wire_dtype)
        rows = rows.contiguous()
        got = rows.new_empty((sum(receive), *rows.shape[1:]))
        work = dist.all_to_all_single(
            got,
            rows,
            output_split_sizes=list(receive),
            input_split_sizes=list(send),
            group=self.group,
            async_op=True,
        )
        if self.meter is not None:
            others = sum(send) - send[self.rank]
            bytes_out = others * rows.shape[1:].numel() * rows.element_size()
            rows_out = others * rows.shape[1:-1].numel() if rows.dim() > 1 else 0
            self.meter.record("all_to_all", label, bytes_out=bytes_out, rows_out=rows_out)
        return PendingRows(self, work, sent=rows, got=got, dtype=dtype, label=label)

    @contextmanager
    def _waiting(
        self, kind: CollectiveKind, label: ExchangeLabel | None, device: torch.device
    ) -> Iterator[None]:
        if self.meter is None:
            yield
        else:
            with self.meter.waiting(kind, label, device):
                yield


class PendingRows:
    """Rows on their way between ranks; what is sent must not change until they have come."""

    def __init__(
        self,
        ranks: Ranks,
        work: dist.Work,
        *,
        sent: Tensor,
        got: Tensor,
        dtype: torch.dtype,
        label: ExchangeLabel | None,
    ) -> None:
        self._ranks, self._work = ranks, work
        self._sent, self._got, self._dtype, self._label = sent, got, dtype, label

    def wait(self) -> Tensor:
        """Return the rows that came, in the type of those that were sent."""
        with self._ranks._waiting("all_to_all", self._label, self._got.device):
            self._work.wait()
        return self._got.to(self._dtype)


def launched_world_size() -> int:
    """Processes that the launcher started, before any of them has joined the others.

    Raises:
        ConfigError: if `tsmoe launch` planned another number of them.
    """
    _map_slurm_variables()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    planned = int(os.environ.get("TSMOE_RANKS", size))
    if planned != size:
        raise ConfigError(
            f"{planned} ranks were to train together, but the launcher made groups of {size}; they "
            "would train apart from one another: look at its host list, or use another backend"
        )
    return size


def start(
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    device: str = "auto",
    store: dist.Store | None = None,
) -> Ranks:
    """Join the processes that a launcher (deepspeed, torchrun, accelerate, srun) started.

    Collective: every rank must call it. Communicates by gloo on CPU and NCCL on GPUs; a collective
    that waits for a lost rank fails after `timeout_seconds` instead of hanging.

    Args:
        timeout_seconds: of every collective.
        device: auto, cpu or cuda.
        store: where the ranks meet, if they have met before; else at MASTER_ADDR.

    Raises:
        ConfigError: if the launcher's variables are incomplete.
    """
    size = launched_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch_device = choose_device(device, local_rank)
    if size == 1:
        return Ranks(device=torch_device)
    share_cores(torch_device, size)
    check_launch_variables()
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if torch_device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            store=store,
            rank=-1 if store is None else int(os.environ["RANK"]),
            world_size=-1 if store is None else size,
        )
    return Ranks(
        rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local_rank, device=torch_device
    )


def share_cores(device: torch.device, world_size: int) -> None:
    """Leave each rank of this machine its part of the cores, where it computes on them."""
    if world_size > 1 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each takes all cores, and they get in one another's way.
        neighbours = (
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size
        )
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(neighbours)))


def check_launch_variables() -> None:
    """Refuse a launcher that does not say where its ranks meet.

    Raises:
        ConfigError: naming the variables.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {launched_world_size()} but {', '.join(missing)} is not set; start the "
            "ranks with deepspeed, torchrun or accelerate, or export the missing variables"
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


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Return the device that a rank computes on, and make a GPU the current one of this thread.

    Raises:
        ConfigError: if there is no GPU left for it.
    """
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
