"""Make batches ahead of time in threads, and hand them out in order.

A worker is a thread, not a process: what it does is copying, for which numpy and torch let go of
Python's lock, and it writes where the consumer reads. A process copies each batch once more, into
shared memory that is mapped anew each time. Measured by benchmarks/loader.py; there a consumer
that is busy in Python all the time loses less to threads than to processes, as those must be
served by threads of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from tsmoe.errors import DataError

T = TypeVar("T")

# Batches that are ready or in work, for each worker.
_BATCHES_AHEAD = 2
_SECONDS_TO_END = 5.0


class ReadAhead(Generic[T]):
    """Iterates over `make(0), make(1), ..`; an error of a worker is raised where its item is due.

    Workers start with the first item and end with the iteration, however that ends.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        *,
        num_items: int,
        num_workers: int,
        timeout_seconds: float,
        what: str,
    ) -> None:
        """Take note of what to make.

        Args:
            make: called by several threads at a time; its result is a function of the number.
            num_items: how often it is called.
            num_workers: threads; with 0 each item is made when it is asked for.
            timeout_seconds: how long the consumer waits for an item.
            what: names the data in an error.
        """
        self._make = make
        self._num_items = num_items
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._what = what

    def __iter__(self) -> Iterator[T]:
        if self._num_workers == 0:
            return map(self._make, range(self._num_items))
        return self._iterate()

    def _iterate(self) -> Iterator[T]:
        wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        made: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()
        workers = self._start(wanted, made)
        ahead = min(self._num_items, self._num_workers * _BATCHES_AHEAD)
        for number in range(ahead):
            wanted.put(number)
        early: dict[int, T | BaseException] = {}
        try:
            for number in range(self._num_items):
                while number not in early:
                    found, item = self._receive(made, number)
                    early[found] = item
                if ahead < self._num_items:
                    wanted.put(ahead)
                    ahead += 1
                item = early.pop(number)
                if isinstance(item, BaseException):
                    raise item
                yield item
                del item  # the consumer alone decides when its memory may be used again
        finally:
            early.clear()
            for _ in workers:
                wanted.put(None)
            end = time.monotonic() + _SECONDS_TO_END
            for worker in workers:
                # One that hangs is left behind: it is a daemon and does not hold up the end.
                worker.join(max(0.0, end - time.monotonic()))

    def _receive(
        self, made: queue.SimpleQueue[tuple[int, T | BaseException]], number: int
    ) -> tuple[int, T | BaseException]:
        try:
            return made.get(timeout=self._timeout_seconds)
        except queue.Empty:
            raise DataError(
                f"{self._what}: batch {number} was not read within {self._timeout_seconds:g} s; "
                "check that the storage answers, or raise training.timeout_seconds, then start the "
                "same command again: it resumes from the last checkpoint"
            ) from None

    def _start(
        self,
        wanted: queue.SimpleQueue[int | None],
        made: queue.SimpleQueue[tuple[int, T | BaseException]],
    ) -> list[threading.Thread]:
        is_ready = threading.Barrier(self._num_workers + 1)
        workers = [
            threading.Thread(
                target=_work,
                args=(self._make, wanted, made, is_ready),
                name=f"read-ahead-{number}",
                daemon=True,
            )
            for number in range(self._num_workers)
        ]
        num_threads = torch.get_num_threads()
        for worker in workers:
            worker.start()
        is_ready.wait()
        # What a worker sets for itself is also what threads get that are yet to come.
        torch.set_num_threads(num_threads)
        return workers


def _work(
    make: Callable[[int], T],
    wanted: queue.SimpleQueue[int | None],
    made: queue.SimpleQueue[tuple[int, T | BaseException]],
    is_ready: threading.Barrier,
) -> None:
    torch.set_num_threads(1)  # a worker is one core
    is_ready.wait()
    while (number := wanted.get()) is not None:
        item: T | BaseException
        try:
            item = make(number)
        except BaseException as error:
            item = error  # whatever it is, the consumer must hear of it
        made.put((number, item))
        del item
