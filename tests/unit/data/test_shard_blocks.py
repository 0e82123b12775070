from collections import Counter

import numpy as np
import pytest

from tsmoe.data.order import WindowOrder, apportion
from tsmoe.data.permutation import order_key
from tsmoe.data.shard_blocks import ShardBlocks

KEY = order_key("fingerprint", 0)
# Two sources; shard 3 holds series of both. Windows of each series:
SOURCES = np.array([0] * 9 + [1] * 4, np.int32)
SHARDS = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 5, 6], np.int32)
WINDOWS = np.array([5, 3, 1, 20, 2, 9, 9, 4, 4, 7, 6, 6, 6])
COUNTS = np.array([57, 25])


def order(resident_shards: int) -> WindowOrder:
    blocks = ShardBlocks(SOURCES, SHARDS, WINDOWS, resident_shards)
    return WindowOrder(COUNTS, [(0, apportion(np.array([3.0, 1.0])))], KEY, blocks=blocks)


def of_source(order: WindowOrder, source: int, *, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of a source in turn, and the shard of each."""
    sources, numbers = order.draw(np.arange(5000))
    windows = numbers[sources == source][: epochs * COUNTS[source]]
    series = np.flatnonzero(source == SOURCES)
    shards = np.repeat(SHARDS[series], WINDOWS[series])
    return windows, shards[windows]


@pytest.mark.parametrize("resident_shards", [1, 2, 3, 100])
@pytest.mark.parametrize("source", [0, 1])
def test_every_window_comes_once_an_epoch(resident_shards: int, source: int) -> None:
    windows, _ = of_source(order(resident_shards), source, epochs=5)
    for epoch in windows.reshape(5, -1):
        assert sorted(epoch) == list(range(COUNTS[source]))


@pytest.mark.parametrize("resident_shards", [1, 2, 3])
def test_shards_are_left_for_good_within_an_epoch(resident_shards: int) -> None:
    _, shards = of_source(order(resident_shards), 0, epochs=8)
    for epoch in shards.reshape(8, -1):
        first = {shard: int(np.flatnonzero(epoch == shard)[0]) for shard in set(epoch)}
        last = {shard: int(np.flatnonzero(epoch == shard)[-1]) for shard in set(epoch)}
        for place in range(len(epoch)):
            resident = [shard for shard in first if first[shard] <= place <= last[shard]]
            assert len(resident) <= resident_shards


def test_windows_of_a_block_are_mixed() -> None:
    windows, shards = of_source(order(2), 0, epochs=1)
    assert (np.diff(shards) != 0).sum() > 8, "shards of a block alternate"
    assert (np.diff(windows) == 1).sum() < 10


def test_blocks_of_one_size_are_mixed_differently() -> None:
    shards = np.arange(6, dtype=np.int32)
    blocks = ShardBlocks(np.zeros(6, np.int32), shards, np.full(6, 40), 1)
    turns = np.arange(240)
    numbers = blocks.permute(np.zeros_like(turns), turns, np.full(240, 7, np.uint64))
    assert len({tuple(block % 40) for block in numbers.reshape(6, 40)}) == 6


def test_epochs_take_the_shards_in_different_orders() -> None:
    _, shards = of_source(order(1), 0, epochs=12)
    orders = {tuple(dict.fromkeys(epoch.tolist())) for epoch in shards.reshape(12, -1)}
    # Of 24 orders of four shards, twelve at random.
    assert len(orders) > 5


def test_draw_is_a_pure_function_of_the_position() -> None:
    whole = order(2).draw(np.arange(5000))
    places = np.random.default_rng(0).permutation(5000)[:400]
    for ours, expected in zip(order(2).draw(places), whole, strict=True):
        assert np.array_equal(ours, expected[places])


@pytest.mark.parametrize("resident_shards", [1, 2])
def test_shards_are_announced_before_they_are_read(resident_shards: int) -> None:
    ours = order(resident_shards)
    sources, numbers = ours.draw(np.arange(600))
    shards = np.empty_like(numbers)
    for source in (0, 1):
        series = np.flatnonzero(source == SOURCES)
        of = np.repeat(SHARDS[series], WINDOWS[series])
        shards[sources == source] = of[numbers[sources == source]]
    late = 0
    for position in range(0, 500, 7):
        ahead = ours.shards_ahead(position).tolist()
        assert len(ahead) == len(set(ahead)) <= 4 * resident_shards
        # A block lasts for more than four windows, most for many more.
        late += len(set(shards[position : position + 5].tolist()) - set(ahead))
    assert late == 0


def test_spread_names_as_many_shards_of_each_source() -> None:
    blocks = ShardBlocks(SOURCES, SHARDS, WINDOWS, 2)
    chosen = {
        (s, h) for s, h, yes in zip(SOURCES, SHARDS, blocks.is_in_spread(), strict=True) if yes
    }
    assert Counter(source for source, _ in chosen) == {0: 2, 1: 2}
    assert blocks.num_resident == 4
    assert ShardBlocks(SOURCES, SHARDS, WINDOWS, 100).is_in_spread().all()
