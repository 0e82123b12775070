"""Time loaders in turns: each turn is a process that delivers batches for some seconds.

Used by our environment and by that of the peers, so it needs nothing but Python.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Windows as they are trained on: the longest context of the presets and a patch.
CONTEXT_LENGTH, PATCH_LENGTH, BATCH_SIZE = 2880, 96, 512
WINDOW_LENGTH = CONTEXT_LENGTH + PATCH_LENGTH
NUM_WORKERS = 2

Batches = Iterator[int]
"""Yields the points of each batch that was delivered."""


def cpu_seconds() -> float:
    """CPU time of this process and of its children, such as the workers of a loader."""
    total, own = 0, os.getpid()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
        except (OSError, IndexError):
            continue  # ended meanwhile
        if int(folder.name) == own:
            total += sum(map(int, fields[11:15]))  # and that of children that have ended
        elif int(fields[1]) == own:
            total += sum(map(int, fields[11:13]))
    return total / _TICKS


def deliver(batches: Batches, *, seconds: float, warm_up: int = 3) -> dict[str, float]:
    """Take batches for some seconds, after a few that are not counted."""
    begun = time.perf_counter()
    next(batches)
    first_batch = time.perf_counter() - begun
    for _ in range(warm_up):
        next(batches)
    points, cpu, begun = 0, cpu_seconds(), time.perf_counter()
    while (wall := time.perf_counter() - begun) < seconds:
        points += next(batches)
    return {
        "points": points,
        "wall": wall,
        "cpu": cpu_seconds() - cpu,
        "first_batch_seconds": first_batch,
    }


def deliver_by_processes(
    make: Callable[[int], Batches], *, seconds: float, processes: int = 2
) -> dict[str, float]:
    """Let each of several processes take batches of its own, all at the same time."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.SimpleQueue()

    def work(number: int) -> None:
        batches = make(number)
        next(batches)
        barrier.wait()
        results.put(deliver(batches, seconds=seconds))

    workers = [context.Process(target=work, args=(number,)) for number in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return {
        "points": sum(turn["points"] for turn in found),
        "wall": max(turn["wall"] for turn in found),
        "cpu": sum(turn["cpu"] for turn in found),
        "first_batch_seconds": max(turn["first_batch_seconds"] for turn in found),
    }


def report(turn: dict[str, float]) -> None:
    """Print what a turn found, for the process that started it."""
    print(json.dumps(turn), flush=True)
    os._exit(0)  # some loaders' workers wait for ever when a consumer stops early
