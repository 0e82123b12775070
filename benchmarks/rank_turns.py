"""Worker processes that take training steps when told to, alone or two at a time.

All of them live through a benchmark and take turns, so that a busy machine slows all alike: two
processes that are a world of their own each, and two ranks of one world, in which the same windows
are trained on with experts on every rank or spread over both.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fake_ranks import import_heavy
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

_TIMED = ("all_reduce", "all_gather_into_tensor", "all_to_all_single", "reduce_scatter_tensor",
          "reduce", "broadcast")  # fmt: skip


class WaitTimer:
    """Wall seconds that this process waits in collectives, by their names in torch."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        for name in _TIMED:
            setattr(dist, name, self._timed(name, getattr(dist, name)))

    def take(self) -> dict[str, float]:
        """Return the sums and start anew."""
        taken, self.seconds = self.seconds, {}
        return taken

    def add(self, name: str, begun: float) -> None:
        """Count the time since `begun`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            work = call(*args, **kwargs)
            self.add(name, begun)
            return _TimedWork(work, name, self) if work is not None else None

        return timed


class _TimedWork:
    """A collective under way, whose `wait` is timed."""

    def __init__(self, work: Any, name: str, timer: WaitTimer) -> None:
        self._work, self._name, self._timer = work, name, timer

    def wait(self, *args: Any) -> Any:
        begun = time.perf_counter()
        result = self._work.wait(*args)
        self._timer.add(self._name, begun)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Worker:
    """A process that does what it is told, one call at a time."""

    def __init__(
        self, rank: int, world_size: int, port: int, configs: dict[str, RunConfig]
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, rank, world_size, port, configs), daemon=True
        )
        self.process.start()

    def tell(self, what: str, *args: Any) -> None:
        """Start a call of one of the functions below."""
        self._pipe.send((what, args))

    def result(self) -> Any:
        """Wait for what it returns."""
        is_done, value = self._pipe.recv()
        if not is_done:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self._pipe.send(("stop", ()))
        self.process.join()


def start_workers(world_size: int, configs: dict[str, RunConfig]) -> list[Worker]:
    """Start the ranks of one world; each builds an engine for every config. Forks."""
    import_heavy()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [Worker(rank, world_size, port, configs) for rank in range(world_size)]
    for worker in workers:
        worker.result()
    return workers


def together(workers: Sequence[Worker], what: str, *args: Any) -> list[Any]:
    """Let workers do the same at the same time and return what each found."""
    for worker in workers:
        worker.tell(what, *args)
    return [worker.result() for worker in workers]


def _serve(
    pipe: Connection, rank: int, world_size: int, port: int, configs: dict[str, RunConfig]
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    try:
        torch.set_num_threads(1)
        timer = WaitTimer()
        ranks = ranks_module.start(device="cpu")
        engines = {
            name: build_engine(config, ranks, prepare=prepare_pretraining)
            for name, config in configs.items()
        }
        batches = {name: random_walks(config, seed=rank) for name, config in configs.items()}
        calls: dict[str, Callable[..., Any]] = {
            "step": lambda name, count: _steps(
                engines[name], configs[name], batches[name], timer, count
            ),
            "collective": _time_collective,
        }
        pipe.send((True, None))
        while (message := pipe.recv())[0] != "stop":
            pipe.send((True, calls[message[0]](*message[1])))
    except BaseException:  # whatever it is, the one who waits shall know
        pipe.send((False, traceback.format_exc()))
    os._exit(0)


def random_walks(config: RunConfig, *, seed: int) -> WindowBatch:
    """Windows for a micro-batch."""
    windows, length = config.training.micro_batch_size, config.model.window_length
    generator = torch.Generator().manual_seed(seed)
    values_BCL = torch.randn(windows, 1, length, generator=generator).cumsum(-1)
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=observed_BCL,
        is_target_BCL=observed_BCL,
        series_ids_B=torch.zeros(windows, dtype=torch.int64),
    )


def _steps(
    engine: Engine, config: RunConfig, batch: WindowBatch, timer: WaitTimer, count: int
) -> dict[str, Any]:
    """Take some steps; seconds are of one."""
    update_seconds = 0.0
    update, timer.seconds = engine.update, {}

    def timed_update(*, lr: float) -> Any:
        nonlocal update_seconds
        begun, waited = time.perf_counter(), sum(timer.seconds.values())
        report = update(lr=lr)
        update_seconds += time.perf_counter() - begun - sum(timer.seconds.values()) + waited
        return report

    engine.update = timed_update  # type: ignore[method-assign]
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(count):
        report = training_step(
            engine,
            [batch],
            step=step,
            lr=1e-4,
            balance_rate=config.balance.rate,
            objective=NextPatchObjective(
                error_unit=config.training.error_unit, target_clip=config.training.target_clip
            ),
            series_name=str,
        )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    engine.update = update  # type: ignore[method-assign]
    load_E = report.load_ME.double().unflatten(1, (engine.ranks.size, -1)).sum(2)
    return {
        "wall": wall / count,
        "cpu": cpu / count,
        "update": update_seconds / count,
        "waits": {name: seconds / count for name, seconds in timer.take().items()},
        # If experts are spread in order over all ranks.
        "fuller_rank": float((load_E.amax(1) / load_E.mean(1)).mean()),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _time_collective(kind: str, num_bytes: int, rounds: int) -> float:
    """Return the best seconds of a collective, whose larger side has so many bytes."""
    whole = torch.zeros(num_bytes // 4)
    part = torch.zeros(num_bytes // 4 // dist.get_world_size())
    received = torch.empty_like(whole)
    calls: dict[str, Callable[[], Tensor | None]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "all_to_all": lambda: dist.all_to_all_single(received, whole),
    }
    best = float("inf")
    for _ in range(rounds):
        dist.barrier()
        begun = time.perf_counter()
        calls[kind]()
        best = min(best, time.perf_counter() - begun)
    return best
