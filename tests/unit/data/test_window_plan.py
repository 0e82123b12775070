import threading

import numpy as np
import pytest

from tsmoe.data.gather import WindowGather
from tsmoe.data.loader import shard_blocks
from tsmoe.data.order import WindowOrder, apportion
from tsmoe.data.permutation import order_key
from tsmoe.data.plan import WindowPlan
from tsmoe.data.windows import training_windows
from tsmoe.ranks import Ranks


@pytest.fixture
def plan(make_corpus, monkeypatch) -> WindowPlan:
    """Stretches of four micro-batches of eight windows."""
    monkeypatch.setattr("tsmoe.data.plan._WINDOWS_AT_A_TIME", 32)
    corpus = make_corpus({"a": [300], "b": [100, 40]})
    index = training_windows(corpus, window_length=24, patch_length=4, stride=1)
    order = WindowOrder(index.counts, [(0, apportion(np.array([1.0, 2.0])))], order_key("f", 0))
    return WindowPlan(
        WindowGather(corpus, 24), index, order, micro_batch_size=8, ranks=Ranks(), first_window=100
    )


def spied(plan: WindowPlan, monkeypatch) -> list[int]:
    drawn: list[int] = []
    draw = plan._draw

    def spy(number: int) -> object:
        drawn.append(number)
        return draw(number)

    monkeypatch.setattr(plan, "_draw", spy)
    return drawn


def test_windows_are_drawn_once_for_several_batches(plan, monkeypatch) -> None:
    drawn = spied(plan, monkeypatch)
    positions = [plan[item][0].tolist() for item in range(8)]
    assert drawn == [0, 1]
    assert sum(positions, []) == list(range(100, 164))  # noqa: RUF017 - a few lists


def test_any_item_may_be_asked_for(plan) -> None:
    for item in (40, 3, 39, 0, 17, 3):
        positions, windows = plan[item]
        assert positions.tolist() == list(range(100 + 8 * item, 108 + 8 * item))
        assert len(windows.series) == len(windows.starts) == 8


def test_next_stretch_is_drawn_in_the_second_half_of_one(plan, monkeypatch) -> None:
    drawn = spied(plan, monkeypatch)
    for item in range(4):
        plan[item]
        plan.prepare(item)
        assert drawn == ([0] if item < 2 else [0, 1])
    plan[4]
    assert drawn == [0, 1]


def test_worker_that_prepares_does_not_hold_up_the_others(plan, monkeypatch) -> None:
    plan[0]
    is_drawing, may_go_on = threading.Event(), threading.Event()
    draw = plan._draw

    def slow(number: int) -> object:
        is_drawing.set()
        assert may_go_on.wait(10)
        return draw(number)

    monkeypatch.setattr(plan, "_draw", slow)
    preparing = threading.Thread(target=plan.prepare, args=(2,))
    preparing.start()
    assert is_drawing.wait(10)
    plan[3]  # of the stretch at hand
    plan.prepare(3)  # leaves it to the one that is at it
    may_go_on.set()
    preparing.join()
    assert plan[4][0].tolist() == list(range(132, 140))


def test_shards_of_a_remote_corpus_are_asked_for_before_they_are_needed(
    make_corpus, monkeypatch
) -> None:
    monkeypatch.setattr("tsmoe.data.plan._WINDOWS_AT_A_TIME", 8)
    corpus = make_corpus({"a": [60] * 12, "b": [90] * 5}, shard_size_bytes=900)
    assert len(corpus.manifest.shards) > 8
    asked: list[list[int]] = []
    monkeypatch.setattr(corpus, "max_resident_shards", 4)
    monkeypatch.setattr(corpus, "prefetch", lambda shards: asked.append(list(shards)))
    index = training_windows(corpus, window_length=24, patch_length=4, stride=4)
    order = WindowOrder(
        index.counts, [(0, apportion(np.array([1.0, 1.0])))], order_key("f", 0),
        blocks=shard_blocks(corpus, index, 1),
    )  # fmt: skip
    plan = WindowPlan(
        WindowGather(corpus, 24), index, order, micro_batch_size=4, ranks=Ranks(), first_window=0
    )
    known: set[int] = set()
    surprises = 0
    for item in range(0, 60, 2):
        before = len(asked)
        _, windows = plan[item]
        assert len(asked) == before + 1
        needed = set(corpus.series_shards[windows.series].tolist())
        assert needed <= set(asked[-1])
        surprises += bool(item) and len(needed - known)
        known = set(asked[-1])
    # What a stretch needs was announced by the one before it.
    assert surprises == 0
