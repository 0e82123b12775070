"""Shares that change at certain positions, and the order that default settings have always had."""

import hashlib

import numpy as np
import pytest

from tsmoe.data.order import DECK_SIZE, WindowOrder, apportion, temperature_weights
from tsmoe.data.permutation import order_key

KEY = order_key("fingerprint", 0)
COUNTS = np.array([90_000, 700, 40_000])
WEIGHTS = ([5.0, 1.0, 4.0], [1.0, 0.0, 1.0], [0.0, 3.0, 1.0])
# The second phase is longer than a deck, none begins or ends with one.
STARTS = (0, 100_001, 250_003)


@pytest.fixture(scope="module")
def order() -> WindowOrder:
    quotas = [apportion(np.array(weights)) for weights in WEIGHTS]
    return WindowOrder(COUNTS, list(zip(STARTS, quotas, strict=True)), KEY)


@pytest.fixture(scope="module")
def drawn(order: WindowOrder) -> tuple[np.ndarray, np.ndarray]:
    return order.draw(np.arange(400_000))


@pytest.mark.parametrize(
    ("counts", "sizes", "temperature", "seed", "windows", "digest"),
    [
        (
            [100_000, 50_000, 0, 25_000], [100_000, 50_000, 0, 25_000], 1.0, 0,
            [64233, 67026, 10018, 8432, 21140, 9240, 88758, 30866, 18771, 40650],
            "a979c0aa93e053f467fb49257571a0494f0f2b392c474c354fc19c1c8dd81cfe",
        ),
        (
            [700, 10**6, 3, 2 * 10**9], [5000, 10**7, 40, 3 * 10**11], 0.5, 7,
            [632224562, 1287397017, 825413912, 426245311, 356825925,
             1006751075, 1598546127, 1465291423, 1621390485, 208486263],
            "8c20bd32561129a11ca898377a1ff3b22a4500d48baa604e27ba27fab8301915",
        ),
        (
            [1234567], [10**6], 0.5, 1,
            [1214782, 730746, 675543, 521998, 48951, 1004774, 1152579, 221318, 308168, 91583],
            "2f4d89cef4dde2a24264fa7268f69d649c4b4ba328547a57348ab25311b595f2",
        ),
    ],
)  # fmt: skip
def test_order_of_runs_that_began_long_ago_stays(
    counts, sizes, temperature, seed, windows, digest
) -> None:
    # Checkpoints hold a position only: another order would train on windows twice.
    quotas = apportion(temperature_weights(np.array(counts), np.array(sizes), temperature))
    order = WindowOrder(np.array(counts), [(0, quotas)], order_key("fingerprint", seed))
    places = np.array([0, 1, 2, 3, 4, 65535, 65536, 10**6, 10**9 + 7, 10**12])
    assert order.draw(places)[1].tolist() == windows
    source, window = order.draw(np.arange(60_000, 200_000))
    assert hashlib.sha256(source.tobytes() + window.tobytes()).hexdigest() == digest


@pytest.mark.parametrize("phase", range(3))
def test_decks_of_a_phase_have_its_shares_exactly(drawn, phase: int) -> None:
    deck = drawn[0][STARTS[phase] : STARTS[phase] + DECK_SIZE]
    expected = apportion(np.array(WEIGHTS[phase]))
    assert np.bincount(deck, minlength=3).tolist() == expected.tolist()


@pytest.mark.parametrize("source", range(3))
def test_epochs_of_a_source_go_on_across_phases(drawn, source: int) -> None:
    windows = drawn[1][drawn[0] == source]
    count = COUNTS[source]
    assert len(windows) > 1.2 * count, "more than an epoch"
    for epoch in range(len(windows) // count):
        assert len(np.unique(windows[epoch * count : (epoch + 1) * count])) == count
    rest = windows[len(windows) // count * count :]
    assert len(np.unique(rest)) == len(rest)


def test_phase_before_the_first_change_is_as_without_changes(drawn) -> None:
    alone = WindowOrder(COUNTS, [(0, apportion(np.array(WEIGHTS[0])))], KEY)
    places = np.arange(STARTS[1])
    for ours, theirs in zip(drawn, alone.draw(places), strict=True):
        assert np.array_equal(ours[: STARTS[1]], theirs)


def test_draw_is_a_pure_function_of_the_position_in_every_phase(order, drawn) -> None:
    places = np.random.default_rng(0).permutation(400_000)[:300]
    together = order.draw(places)
    for ours, whole in zip(together, drawn, strict=True):
        assert np.array_equal(ours, whole[places])


@pytest.mark.parametrize(
    "position", [0, 1, 65_536, 100_000, 100_001, 100_002, 231_073, 250_003, 399_999]
)
def test_what_was_dealt_is_known_without_dealing(order, drawn, position: int) -> None:
    expected = np.bincount(drawn[0][:position], minlength=3)
    assert order.dealt(position).tolist() == expected.tolist()


def test_decks_of_two_phases_are_shuffled_differently() -> None:
    quotas = apportion(np.array([1.0, 1.0]))
    order = WindowOrder(np.array([10**6, 10**6]), [(0, quotas), (10, quotas)], KEY)
    first, second = order.draw(np.arange(DECK_SIZE))[0], order.draw(10 + np.arange(DECK_SIZE))[0]
    assert 0.45 < (first == second).mean() < 0.55
