"""One rank of a large run, all by itself: the real set-up and a real step, without communication.

torch's fake process group answers every collective at once. What a rank would do among thousands
of others can then be watched in one process: the groups that it makes, the experts and the part of
the optimizer that it holds, what it writes into a checkpoint, and each collective of a step. From
several ranks of one run one sees whether they would fit together, see `rank_mistakes`.

All ranks are dealt the same windows, and expert answers from other ranks are zeros, as nobody has
their weights: so all route alike in every layer, and what one sends must be what another expects.
The loss is therefore that of a real run only where experts are not spread.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import (
    ParameterState,
    expert_parameters,
    persistent_buffers,
    take_snapshot,
)
from tsmoe.checkpoint.layout import STATE_KINDS
from tsmoe.engine.build import build_engine
from tsmoe.moe.experts import Experts
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

Members = tuple[int, ...]
_EXCHANGE = "alltoall_base_"


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One call of a rank."""

    kind: str
    """As torch names it: `alltoall_base_`, `allreduce_`, `_allgather_base_`, `broadcast_`, .."""
    members: Members
    shape: tuple[tuple[int, ...], ...]
    """Of each tensor handed in, inputs and outputs; rows of an exchange are left out."""
    num_bytes: int
    """Of the larger one."""
    send: tuple[int, ...] = ()
    """Rows for each member; empty where all get equally many."""
    receive: tuple[int, ...] = ()
    row_bytes: int = 0
    """Of one of them."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How one parameter group of ZeRO is cut over ranks that hold the same parameters."""

    num_elements: int
    """Of the whole group, without padding."""
    size: int
    """Elements on this rank, of its fp32 master and each moment."""
    members: Members


@dataclass(frozen=True, kw_only=True)
class FakeRank:
    """What one rank did."""

    rank: int
    world_size: int
    groups: tuple[Members, ...]
    """All groups that were made, in order; every rank must make the same ones."""
    sharing: Members
    """The ranks that this one shares a set of experts with."""
    expert_ids: tuple[tuple[int, ...], ...]
    """Global ids of the experts it holds, by layer."""
    num_experts: int
    partitions: tuple[Partition, ...]
    writes: dict[str, tuple[str, ...]]
    """Keys it writes into each file of a checkpoint."""
    state: tuple[str, ...]
    """Keys of the whole training state, whoever writes them."""
    collectives: tuple[Collective, ...]
    """Of one training step, in order."""
    loss: float
    group_seconds: float
    build_seconds: float
    step_seconds: float
    peak_mib: float


def fake_run(config: RunConfig, ranks: Sequence[int], world_size: int) -> list[FakeRank]:
    """Set up and step each of some ranks of a run, one after the other in processes of their own.

    The processes are forked, so the caller must never have run a backward pass: autograd's threads
    are not copied.
    """
    import_heavy()
    tasks = [(config, rank, world_size) for rank in ranks]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(fake_rank, tasks, chunksize=1)


def import_heavy() -> None:
    """Import what an engine needs, once for all processes that are forked from here."""
    for name in (
        "deepspeed.moe.layer",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # and half of torch's compiler with it
        "deepspeed.runtime.zero.stage_1_and_2",
        "torch._dynamo",
    ):
        importlib.import_module(name)


def fake_rank(config: RunConfig, rank: int, world_size: int) -> FakeRank:
    """Be one rank; the process cannot be another one afterwards."""
    config.check_world_size(world_size)
    ranks = start_fake(rank, world_size)
    begun = time.perf_counter()
    with _new_groups() as (groups, group_seconds):
        engine = build_engine(config, ranks, prepare=prepare_pretraining)
    build_seconds = time.perf_counter() - begun
    layers = [module for module in engine.model.modules() if isinstance(module, Experts)]
    snapshot = take_snapshot(engine.model, _first_elements, ranks)
    begun = time.perf_counter()
    with CollectiveTrace() as trace:
        report = training_step(
            engine,
            [windows_of_all(config)],
            step=0,
            lr=config.optimizer.lr,
            balance_rate=config.balance.rate,
            objective=NextPatchObjective(
                error_unit=config.training.error_unit, target_clip=config.training.target_clip
            ),
            series_name=str,
        )
    return FakeRank(
        rank=rank,
        world_size=world_size,
        groups=tuple(groups),
        sharing=_members(layers[0].ranks.group),
        expert_ids=tuple(tuple(layer.global_ids) for layer in layers),
        num_experts=layers[0].num_experts,
        partitions=_partitions(engine),
        writes={name: tuple(tensors) for name, tensors in snapshot.items()},
        state=_state(engine.model),
        collectives=tuple(trace.collectives),
        loss=report.loss,
        group_seconds=sum(group_seconds),
        build_seconds=build_seconds,
        step_seconds=time.perf_counter() - begun,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def start_fake(rank: int, world_size: int) -> Ranks:
    """Join a world in which nobody else is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank % 8)}
    torch.set_num_threads(1)
    if dist.is_initialized():
        raise RuntimeError("this process is a rank already; start another one")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return Ranks(rank=rank, size=world_size, local_rank=rank % 8)


class CollectiveTrace(TorchDispatchMode):
    """Writes down every collective of torch.distributed, whoever calls it.

    Exchanges among alike ranks are answered as these would: counts for this rank are the same from
    all. Rows come as zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    # What torch passes has no narrower type.
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation; answer and record it if it is a collective."""
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        kind = func._schema.name.removeprefix("c10d::")
        group = next(arg for arg in args if isinstance(arg, torch.ScriptObject))
        members = _members(dist.ProcessGroup.unbox(group))
        tensors = [t for arg in args for t in _tensors(arg)]
        send: tuple[int, ...] = ()
        receive: tuple[int, ...] = ()
        if kind == _EXCHANGE:
            output, given = tensors
            receive, send = tuple(args[3]), tuple(args[4])
            if send:
                _check_splits(given, send, members)
                output.zero_()
                # The fake group copies what was given, which may be fewer rows than are awaited.
                nobody = [0] * len(members)
                args = (output[:0], given[:0], args[2], nobody, nobody, *args[5:])
        result = func(*args, **(kwargs or {}))
        if kind == _EXCHANGE and not send:
            blocks = given.unflatten(0, (len(members), -1))
            place = members.index(dist.get_rank())
            output.copy_(blocks[place].repeat(len(members), *[1] * (given.ndim - 1)))
        self.collectives.append(
            Collective(
                kind=kind,
                members=members,
                shape=tuple(tuple(t.shape[1:] if send else t.shape) for t in tensors),
                num_bytes=max(t.numel() * t.element_size() for t in tensors),
                send=send,
                receive=receive,
                row_bytes=given.shape[1:].numel() * given.element_size() if send else 0,
            )
        )
        return result


def _check_splits(given: torch.Tensor, send: tuple[int, ...], members: Members) -> None:
    if sum(send) != len(given) or len(send) != len(members):
        raise RuntimeError(f"{len(given)} rows are sent as {send} to {len(members)} ranks")


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)


def _members(group: Any) -> Members:
    return tuple(dist.get_process_group_ranks(group))


@contextmanager
def _new_groups() -> Iterator[tuple[list[Members], list[float]]]:
    """Collect the members of each group that is made, and the seconds that it took."""
    made: list[Members] = []
    seconds: list[float] = []
    new_group = dist.new_group

    def watched(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        group = new_group(ranks, *args, **kwargs)
        seconds.append(time.perf_counter() - begun)
        made.append(tuple(range(dist.get_world_size()) if ranks is None else ranks))
        return group

    dist.new_group = watched
    try:
        yield made, seconds
    finally:
        dist.new_group = new_group


def _first_elements(parameter: nn.Parameter) -> ParameterState:
    # Who writes what does not depend on values: one element of each row of the first axis will do.
    few = torch.zeros(parameter.shape[:1])
    return ParameterState(value=few, exp_avg=few, exp_avg_sq=few)


def _state(model: nn.Module) -> tuple[str, ...]:
    """Keys of what a checkpoint must hold."""
    experts = expert_parameters(model)
    keys = [f"buffer/{name}" for name in persistent_buffers(model)]
    for name, _ in model.named_parameters():
        ids = [f"/{i}" for i in range(experts[name].num_experts)] if name in experts else [""]
        keys += [f"{kind}/{name}{suffix}" for kind in STATE_KINDS for suffix in ids]
    return tuple(keys)


def _partitions(engine: Any) -> tuple[Partition, ...]:
    # DeepSpeed has no public word for it: lists by parameter group, and the ranks of each.
    zero = engine._zero
    return tuple(
        Partition(
            num_elements=sum(parameter.numel() for parameter in parameters),
            size=partition.numel(),
            members=_members(group),
        )
        for parameters, partition, group in zip(
            zero.bit16_groups,
            zero.single_partition_of_fp32_groups,
            zero.real_dp_process_group,
            strict=True,
        )
    )


def windows_of_all(config: RunConfig) -> WindowBatch:
    """The same random walks for every rank."""
    windows, length = config.training.micro_batch_size, config.model.window_length
    generator = torch.Generator().manual_seed(config.seed)
    values_BCL = torch.randn(windows, 1, length, generator=generator).cumsum(-1)
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=observed_BCL,
        is_target_BCL=observed_BCL,
        series_ids_B=torch.zeros(windows, dtype=torch.int64),
    )
