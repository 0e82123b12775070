"""Make batches ahead of time in threads, and hand them out in order.

A worker is a thread, not a process. What it does is copying, for which torch lets go of Python's
lock, and it writes where the consumer reads; a process copies each batch once more, into shared
memory that is mapped anew each time, and is a risk to fork beside CUDA and DeepSpeed. Measured by
benchmarks/loader.py on two cores, where workers compete with the consumer: a consumer that never
lets go of Python's lock takes 1.01 times as long for a step with two threads beside it, and 1.3
times as long with two processes of torch's DataLoader that run the same code, as those are served
by a thread of its own. What stands in a worker's way is Python between two copies, so there is
little: windows are drawn for many batches at once.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch

from tsmoe.errors import DataError

T = TypeVar("T")

# Items that are ready or in work, for each worker.
_ITEMS_AHEAD = 2
_SECONDS_TO_END = 5.0


class ReadAhead(Generic[T]):
    """Iterates over `make(0), make(1), ..`; an error of a worker is raised where its item is due.

    Workers start with the first item, and end with the last one, with `close`, when the iterator is
    forgotten, or with the program.
    """

    def __init__(
        self,
        make: Callable[[int], T],
        *,
        num_items: int,
        num_workers: int,
        timeout_seconds: float,
        what: str,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        """Take note of what to make.

        Args:
            make: called by several threads at a time; its result is a function of the number.
            num_items: how often it is called.
            num_workers: threads; with 0 each item is made when it is asked for.
            timeout_seconds: how long the consumer waits for an item.
            what: names the data in an error.
            prepare: called by a worker when it has handed over an item, with its number, for what
                later items need; what fails there must fail again where it is needed.
        """
        self._make = make
        self._num_items = num_items
        self._num_workers = num_workers
        self._timeout_seconds = timeout_seconds
        self._what = what
        self._prepare = prepare
        self._next = 0
        self._num_asked = 0
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[_Made] = queue.SimpleQueue()
        self._early: dict[int, _Made] = {}
        self._end: weakref.finalize | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        number = self._next
        if number == self._num_items:
            self.close()
            raise StopIteration
        self._next += 1
        if self._num_workers == 0:
            return self._make(number)
        if self._end is None:
            self._start()
        # Asked for as one is handed out: what is held here does not grow while the consumer works.
        while self._num_asked < min(self._num_items, number + 1 + self._num_workers * _ITEMS_AHEAD):
            self._wanted.put(self._num_asked)
            self._num_asked += 1
        while number not in self._early:
            made = self._receive(number)
            self._early[made.number] = made
        made = self._early.pop(number)
        if made.error is not None:
            self.close()
            raise made.error
        return cast(T, made.item)

    def extend(self, num_items: int) -> None:
        """Make more items after the last, which must not have been asked for yet in vain."""
        self._num_items += num_items

    def close(self) -> None:
        """End the workers; may be called more than once."""
        self._next = self._num_items
        self._early.clear()
        if self._end is not None:
            self._end()

    def _receive(self, number: int) -> _Made:
        try:
            return self._made.get(timeout=self._timeout_seconds)
        except queue.Empty:
            self.close()
            raise DataError(
                f"{self._what}: batch {number} was not read within {self._timeout_seconds:g} s; "
                "check that the storage answers, or raise training.timeout_seconds, then start the "
                "same command again: it resumes from the last checkpoint"
            ) from None

    def _start(self) -> None:
        is_ready = threading.Barrier(self._num_workers + 1)
        workers = [
            threading.Thread(
                target=_work,
                args=(self._make, self._prepare, self._wanted, self._made, is_ready),
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
        self._end = weakref.finalize(self, _end, self._wanted, workers)


@dataclass(frozen=True)
class _Made:
    number: int
    item: object = None
    error: BaseException | None = None


def _work(
    make: Callable[[int], object],
    prepare: Callable[[int], None] | None,
    wanted: queue.SimpleQueue[int | None],
    made: queue.SimpleQueue[_Made],
    is_ready: threading.Barrier,
) -> None:
    # A worker is one core. Asked first, as torch takes a thread's number from that of the program
    # when the thread does its first operation, whatever was set before.
    torch.get_num_threads()
    torch.set_num_threads(1)
    is_ready.wait()
    while (number := wanted.get()) is not None:
        try:
            # Nothing is held here once it is handed over, so that its memory can be used again.
            made.put(_Made(number, make(number)))
        except BaseException as error:  # whatever it is, the consumer must hear of it
            made.put(_Made(number, error=error))
        if prepare is not None:
            with contextlib.suppress(Exception):  # comes again where it is needed
                prepare(number)


def _end(wanted: queue.SimpleQueue[int | None], workers: list[threading.Thread]) -> None:
    """Let the workers end before the interpreter does: it would kill them amid native code."""
    with contextlib.suppress(queue.Empty):
        while True:
            wanted.get_nowait()
    for _ in workers:
        wanted.put(None)
    end = time.monotonic() + _SECONDS_TO_END
    for worker in workers:
        # One that hangs is left behind: it is a daemon and does not hold up the end.
        worker.join(max(0.0, end - time.monotonic()))
