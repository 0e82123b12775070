"""The order of windows as a pure function of (key, position): nothing is stored, nothing shuffled.

A position is the number of a window in the whole run, counted over all ranks; any rank can compute
the window at any position in O(log sources), so a run resumes from one number and goes on with
another number of ranks in the same order.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# Windows dealt as one deck: within it each source has its exact share. Large enough that a source
# with 1/65,536 of the weight is still dealt, small enough that shares hold over few steps.
DECK_SIZE = 65536
_ROUNDS = 4


def order_key(fingerprint: str, seed: int) -> np.uint64:
    """Derive the key of an order from the corpus and the seed."""
    digest = hashlib.sha256(f"{fingerprint}/{seed}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class WindowOrder:
    """Deals windows of several sources in fixed shares, each without repetition per epoch."""

    counts: Integers
    """Windows of each source; a source without windows is never dealt."""
    quotas: Integers
    """Windows of each source in a deck; they add up to `DECK_SIZE`."""
    key: np.uint64

    def draw(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the source and the number of the window within it, for each position."""
        decks, places = np.divmod(positions, DECK_SIZE)
        source, turn = np.empty_like(places), np.empty_like(places)
        for deck in np.unique(decks):
            is_here = decks == deck
            sources, turns = self._deal(int(deck))
            source[is_here] = sources[places[is_here]]
            turn[is_here] = turns[places[is_here]]
        turn += decks * self.quotas[source]
        epoch, turn = np.divmod(turn, self.counts[source])
        source_keys = _mix(_mix(~self.key + source.astype(np.uint64)) + epoch.astype(np.uint64))
        return source, permute(turn, self.counts[source], source_keys)

    def _deal(self, deck: int) -> tuple[Integers, Integers]:
        """Return the source at each place of a deck, and how often it was dealt before there."""
        return _deal(self.quotas.tobytes(), int(self.key), deck)


@functools.lru_cache(maxsize=2)
def _deal(quotas_bytes: bytes, key: int, deck: int) -> tuple[Integers, Integers]:
    # A cache of a pure function: about 10 ms for 65,536 windows, and 1 MB.
    quotas = np.frombuffer(quotas_bytes, dtype=np.int64)
    places = np.arange(DECK_SIZE, dtype=np.int64)
    deck_key = _mix(np.array([key], dtype=np.uint64) + np.uint64(deck))
    cards = permute(places, np.full_like(places, DECK_SIZE), deck_key.repeat(DECK_SIZE))
    sources = np.searchsorted(quotas.cumsum(), cards, side="right").astype(np.int64)
    in_order = sources.argsort(kind="stable")
    turns = np.empty_like(places)
    turns[in_order] = places - (quotas.cumsum() - quotas)[sources[in_order]]
    return sources, turns


def make_order(
    counts: Integers, sizes: Integers, *, temperature: float, key: np.uint64
) -> WindowOrder:
    """Give each source a share proportional to `size ** temperature`.

    Args:
        counts: windows of each source.
        sizes: what shares are proportional to, such as points of each source.
        temperature: 1 keeps the sizes' proportions, 0 gives every source the same share.
        key: see `order_key`.

    Raises:
        ValueError: if no source has a window, or more have one than a deck has places.
    """
    has_windows = counts > 0
    if not has_windows.any():
        raise ValueError("no source has a window")
    if has_windows.sum() > DECK_SIZE:
        raise ValueError(
            f"{has_windows.sum()} sources have windows; at most {DECK_SIZE} can be mixed"
        )
    weights = np.where(has_windows, np.maximum(sizes, 1).astype(np.float64) ** temperature, 0)
    exact = weights / weights.sum() * DECK_SIZE
    quotas = np.where(has_windows, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    # Hand out what rounding left over to the largest remainders; take back an excess of the
    # at-least-one rule from the largest quota.
    remainder_order = np.argsort(-(exact - quotas), kind="stable")
    missing = DECK_SIZE - int(quotas.sum())
    eligible = remainder_order[has_windows[remainder_order]]
    if missing > 0:
        quotas[eligible[:missing]] += 1
    while missing < 0:
        largest = np.argsort(-quotas, kind="stable")
        largest = largest[quotas[largest] > 1][:-missing]
        quotas[largest] -= 1
        missing += len(largest)
    return WindowOrder(counts=counts, quotas=quotas, key=key)


def uniform(positions: Integers, key: np.uint64) -> tuple[Floats, Floats]:
    """Return two independent numbers between 0 and 1 for each position."""
    bits = _mix(_mix(positions.astype(np.uint64)) + key)
    low = np.uint64(0xFFFFFFFF)
    return (bits >> np.uint64(32)) / 2**32, (bits & low) / 2**32


def permute(values: Integers, sizes: Integers, keys: NDArray[np.uint64]) -> Integers:
    """Map each value to another of 0..size-1, one to one for each (size, key).

    Ours: a Feistel network over the next power of four, walked until the result is in range (at
    most four steps on average), so that no permutation is ever stored.
    """
    # The exponent of a float64 is the position of the highest bit.
    exponents = (np.maximum(sizes - 1, 1).astype(np.float64).view(np.int64) >> 52) - 1023
    half_bits = ((exponents + 2) // 2).astype(np.uint64)
    limits = sizes.astype(np.uint64)
    result = _feistel(values.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(result >= limits)
    while outside.size:
        result[outside] = _feistel(result[outside], half_bits[outside], keys[outside])
        outside = outside[result[outside] >= limits[outside]]
    return result.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64], half_bits: NDArray[np.uint64], keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + keys + np.uint64(turn << 32)) & mask)
    return (left << half_bits) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64 bits (splitmix64's finaliser)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
