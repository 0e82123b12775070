import numpy as np
import pytest

from tsmoe.data.order import DECK_SIZE, WindowOrder, apportion, temperature_weights
from tsmoe.data.permutation import order_key, permute, permute_all, uniform

KEY = order_key("fingerprint", 0)


def integers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def make_order(
    counts: np.ndarray, sizes: np.ndarray, *, temperature: float, key: np.uint64
) -> WindowOrder:
    return WindowOrder(counts, [(0, quotas_of(counts, sizes, temperature))], key)


def quotas_of(counts: np.ndarray, sizes: np.ndarray, temperature: float) -> np.ndarray:
    return apportion(temperature_weights(counts, sizes, temperature))


def draw(counts: np.ndarray, positions: np.ndarray, **settings: object):
    sizes = settings.pop("sizes", counts)
    order = make_order(counts, sizes, **({"temperature": 1.0, "key": KEY} | settings))
    return order.draw(positions)


def deck(number: int) -> np.ndarray:
    return np.arange(number * DECK_SIZE, (number + 1) * DECK_SIZE, dtype=np.int64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 64, 100, 1000, 65536])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 11, 2**64 - 1])
def test_permutation_is_one_to_one(size: int, key: int) -> None:
    values = np.arange(size, dtype=np.int64)
    keys = np.full(size, key, dtype=np.uint64)
    permuted = permute(values, np.full_like(values, size), keys)
    assert np.array_equal(np.sort(permuted), values)


@pytest.mark.parametrize("half_bits", [1, 3, 8])
@pytest.mark.parametrize("key", [0, 2**64 - 1])
def test_permutation_by_tables_is_the_same(half_bits: int, key: int) -> None:
    values = np.arange(4**half_bits, dtype=np.int64)
    keys = np.full(len(values), key, dtype=np.uint64)
    expected = permute(values, np.full_like(values, len(values)), keys)
    assert permute_all(half_bits, np.uint64(key)).tolist() == expected.tolist()


def test_permutation_maps_each_value_by_its_own_size_and_key() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 2000, 300)
    values = generator.integers(0, sizes)
    keys = generator.integers(0, 2**63, 300).astype(np.uint64)
    together = permute(values, sizes, keys)
    one_by_one = [
        permute(values[i : i + 1], sizes[i : i + 1], keys[i : i + 1])[0] for i in range(300)
    ]
    assert together.tolist() == one_by_one


def test_permutation_scatters_neighbours_and_differs_by_key() -> None:
    values = np.arange(1000, dtype=np.int64)
    sizes = np.full_like(values, 1000)
    first, second = (permute(values, sizes, np.full(1000, key, np.uint64)) for key in (5, 6))
    for permuted in (first, second):
        # Random neighbours are a third of the range apart, and follow one another by chance.
        assert 250 < np.abs(np.diff(permuted)).mean() < 420
        assert (np.diff(permuted) == 1).sum() < 10
    assert (first == second).sum() < 10


@pytest.mark.parametrize("number", [0, 1, 12345])
def test_each_source_has_exactly_its_quota_in_every_deck(number: int) -> None:
    counts = integers(100_000, 50_000, 0, 25_000)
    order = make_order(counts, counts, temperature=1.0, key=KEY)
    assert order.phases[0].quotas.sum() == DECK_SIZE
    source, window = order.draw(deck(number))
    assert np.bincount(source, minlength=4).tolist() == order.phases[0].quotas.tolist()
    assert (window >= 0).all()
    assert (window < counts[source]).all()


def test_quota_is_a_power_of_the_size() -> None:
    counts, sizes = integers(500, 500, 500), integers(1, 4, 16)
    shares = {
        temperature: quotas_of(counts, sizes, temperature) / DECK_SIZE
        for temperature in (0.0, 0.5, 1.0)
    }
    # A quota is a whole number of 65,536 windows.
    np.testing.assert_allclose(shares[0.0], [1 / 3] * 3, atol=2 / DECK_SIZE)
    np.testing.assert_allclose(shares[0.5], np.array([1, 2, 4]) / 7, atol=2 / DECK_SIZE)
    np.testing.assert_allclose(shares[1.0], np.array([1, 4, 16]) / 21, atol=2 / DECK_SIZE)


def test_tiny_source_is_still_dealt_and_an_empty_one_is_not() -> None:
    counts, sizes = integers(10**9, 1, 0, 10**9), integers(10**12, 1, 10**12, 10**12)
    quotas = quotas_of(counts, sizes, 1.0)
    assert quotas.sum() == DECK_SIZE
    assert quotas[1:3].tolist() == [1, 0]


def test_corpus_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="no source has a window"):
        make_order(integers(0, 0), integers(5, 5), temperature=1.0, key=KEY)


def test_source_larger_than_its_quota_repeats_nothing_until_all_was_used() -> None:
    # 3 decks of 65,536 windows, of which this source has two fifths, do not use it up.
    counts = integers(90_000, 135_000)
    source, window = draw(counts, np.concatenate([deck(0), deck(1), deck(2)]))
    of_first = window[source == 0]
    assert 70_000 < len(of_first) <= 90_000
    assert len(np.unique(of_first)) == len(of_first)


def test_windows_of_a_small_source_are_used_equally_often() -> None:
    counts = integers(700, 10**6)
    source, window = draw(counts, np.concatenate([deck(0), deck(1)]), temperature=0.0)
    uses = np.bincount(window[source == 0], minlength=700)
    assert uses.sum() == DECK_SIZE
    assert uses.max() - uses.min() <= 1


def test_small_source_repeats_nothing_within_an_epoch() -> None:
    # 700 windows and a quota of half a deck: dozens of epochs in one deck.
    counts = integers(700, 10**6)
    source, window = draw(counts, deck(0), temperature=0.0)
    of_small = window[source == 0]
    for epoch in range(len(of_small) // 700):
        assert len(np.unique(of_small[epoch * 700 : (epoch + 1) * 700])) == 700


def test_many_small_sources_share_a_deck_with_a_large_one() -> None:
    counts = np.ones(40_000, dtype=np.int64)
    counts[:2] = 10**9
    quotas = quotas_of(counts, counts, 1.0)
    assert quotas.sum() == DECK_SIZE
    assert quotas.min() == 1
    with pytest.raises(ValueError, match="70000 sources"):
        apportion(np.ones(70_000))


def test_uniform_numbers_are_even_independent_and_repeatable() -> None:
    positions = np.arange(20_000, dtype=np.int64)
    first, second = uniform(positions, KEY)
    for numbers in (first, second):
        assert 0 <= numbers.min() < numbers.max() < 1
        # 20,000 numbers: the mean lies within 5 standard errors of a half.
        assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 20_000) ** 0.5
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert np.array_equal(uniform(positions[7:9], KEY)[0], first[7:9])


def test_epochs_of_a_source_are_in_different_orders() -> None:
    # Two decks an epoch: which windows come in its first half is drawn anew.
    counts = integers(2 * DECK_SIZE)
    first, second = (set(draw(counts, deck(number))[1].tolist()) for number in (0, 2))
    assert len(first) == len(second) == DECK_SIZE
    assert 0.48 * DECK_SIZE < len(first & second) < 0.52 * DECK_SIZE


def test_draw_is_a_pure_function_of_the_position() -> None:
    counts = integers(1000, 300)
    positions = np.random.default_rng(0).integers(0, 10**7, 500)
    source, window = draw(counts, positions)
    one_by_one = [draw(counts, positions[i : i + 1]) for i in range(0, 500, 25)]
    assert source[::25].tolist() == [int(drawn[0][0]) for drawn in one_by_one]
    assert window[::25].tolist() == [int(drawn[1][0]) for drawn in one_by_one]


@pytest.mark.parametrize(("fingerprint", "seed"), [("fingerprint", 1), ("other", 0)])
def test_another_seed_or_corpus_is_in_another_order(fingerprint: str, seed: int) -> None:
    counts = integers(10**6, 10**6)
    positions = np.arange(1000, dtype=np.int64)
    first = draw(counts, positions)
    second = draw(counts, positions, key=order_key(fingerprint, seed))
    assert 350 < (first[0] == second[0]).sum() < 650, "sources agree by chance only"
    assert (first[1] == second[1]).sum() < 5
