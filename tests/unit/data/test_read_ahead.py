import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch

from tsmoe.data.read_ahead import ReadAhead
from tsmoe.errors import DataError


def read(make: Callable[[int], object], num_items: int, num_workers: int, **settings: float):
    timeout = settings.get("timeout_seconds", 30.0)
    return ReadAhead(
        make, num_items=num_items, num_workers=num_workers, timeout_seconds=timeout, what="corpus"
    )


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def slowly(number: int) -> int:
    time.sleep(0.002 * (number * 7 % 5))
    return number


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_items", [0, 1, 3, 40])
def test_items_come_in_order(num_workers: int, num_items: int) -> None:
    assert list(read(slowly, num_items, num_workers)) == list(range(num_items))
    assert not workers()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_reads_a_few_items_ahead_and_no_more(num_workers: int) -> None:
    made = []
    items = read(lambda number: made.append(number), 1000, num_workers)
    for taken in range(1, 6):
        next(items)
        time.sleep(0.05)
        assert len(made) == taken + 2 * num_workers
    items.close()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_error_is_raised_where_its_item_is_due(num_workers: int) -> None:
    def make(number: int) -> int:
        if number == 5:
            raise DataError("shard 5 cannot be read")
        return number

    items = read(make, 9, num_workers)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(DataError, match="shard 5 cannot be read"):
        next(items)
    assert not workers()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_worker_that_is_told_to_go_does_not_leave_the_consumer_waiting(error: type) -> None:
    def make(number: int) -> int:
        raise error

    with pytest.raises(error):
        next(read(make, 3, 1))


def test_worker_that_hangs_ends_the_run_with_an_error(monkeypatch) -> None:
    monkeypatch.setattr("tsmoe.data.read_ahead._SECONDS_TO_END", 0.1)
    hangs = threading.Event()
    items = read(lambda number: number if number < 2 else hangs.wait(), 9, 1, timeout_seconds=0.2)
    assert [next(items), next(items)] == [0, 1]
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"corpus: batch 2 was not read within 0\.2 s.*timeout"):
        next(items)
    assert time.monotonic() - begun < 2
    hangs.set()


def test_what_later_items_need_is_prepared_after_an_item_is_handed_over() -> None:
    events: list[tuple[str, int]] = []

    def prepare(number: int) -> None:
        events.append(("prepared", number))
        raise DataError("comes again where it is needed")

    items = ReadAhead(
        lambda number: events.append(("made", number)), num_items=5, num_workers=1,
        timeout_seconds=30, what="", prepare=prepare,
    )  # fmt: skip
    assert len(list(items)) == 5
    assert events == [(what, number) for number in range(5) for what in ("made", "prepared")]


def test_workers_end_when_the_iterator_is_forgotten() -> None:
    items = read(slowly, 1000, 2)
    next(items)
    assert len(workers()) == 2
    del items
    gc.collect()
    assert not workers()


def test_worker_is_one_core_and_leaves_the_threads_of_others_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        items = read(lambda _: torch.get_num_threads(), 4, 2)
        assert list(items) == [1] * 4
        assert torch.get_num_threads() == 3
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [3]
    finally:
        torch.set_num_threads(before)


def test_nothing_of_an_item_is_held_once_it_is_handed_out() -> None:
    import weakref

    class Item:
        pass

    items = read(lambda _: Item(), 6, 1)
    first = weakref.ref(next(items))
    time.sleep(0.05)
    assert first() is None


def test_program_that_ends_amid_native_code_ends_in_peace() -> None:
    # A daemon thread that the interpreter kills within torch would abort the process.
    program = """
import torch
from tsmoe.data.read_ahead import ReadAhead
square = torch.randn(700, 700)
items = ReadAhead(lambda _: square @ square, num_items=10**6, num_workers=2,
                  timeout_seconds=30, what="")
next(items)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
