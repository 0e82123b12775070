"""Keyed permutations and random numbers: pure functions of a position, nothing stored."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Keys = NDArray[np.uint64]

_ROUNDS = 4
# Values that are permuted at a time, so that all that is computed with stays in the core's cache.
_CHUNK = 8192


def order_key(fingerprint: str, seed: int) -> np.uint64:
    """Derive the key of an order from the corpus and the seed."""
    digest = hashlib.sha256(f"{fingerprint}/{seed}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def derived_keys(keys: Keys, numbers: Integers) -> Keys:
    """Derive a key for each number, such as an epoch, from a key."""
    return _scatter(keys + numbers.astype(np.uint64))


def uniform(positions: Integers, key: np.uint64) -> tuple[Floats, Floats]:
    """Return two independent numbers between 0 and 1 for each position."""
    bits = _scatter(_scatter(positions.astype(np.uint64)) + key)
    low = np.uint64(0xFFFFFFFF)
    return (bits >> np.uint64(32)) / 2**32, (bits & low) / 2**32


def permute(values: Integers, sizes: Integers, keys: Keys) -> Integers:
    """Map each value to another of 0..size-1, one to one for each (size, key).

    Ours: a Feistel network over the next power of four, walked until the result is in range (at
    most four steps on average), so that no permutation is ever stored.
    """
    # The exponent of a float64 is the position of the highest bit.
    exponents = (np.maximum(sizes - 1, 1).astype(np.float64).view(np.int64) >> 52) - 1023
    half_bits = ((exponents + 2) // 2).astype(np.uint64)
    limits = sizes.astype(np.uint64)
    walking = values.astype(np.uint64)
    result = np.empty_like(walking)
    places: Integers = np.arange(len(values))
    while places.size:
        for first in range(0, places.size, _CHUNK):
            part = slice(first, first + _CHUNK)
            walking[part] = _feistel(walking[part], half_bits[part], keys[part])
        result[places] = walking  # those that walk on are written again
        outside = np.flatnonzero(walking >= limits)
        places, walking = places.take(outside), walking.take(outside)
        half_bits, keys = half_bits.take(outside), keys.take(outside)
        limits = limits.take(outside)
    return result.view(np.int64)


def permute_all(half_bits: int, key: np.uint64) -> Integers:
    """Return what `permute` maps each of 0..4**half_bits-1 to, of all of them and one key.

    A half has so few values that what a round does with each is looked up in a table.
    """
    halves = np.arange(1 << half_bits, dtype=np.uint64)
    places: Keys = np.arange(1 << 2 * half_bits, dtype=np.uint64)
    left = (places >> np.uint64(half_bits)).astype(np.uint16)
    right = (places & halves[-1]).astype(np.uint16)
    for turn in range(_ROUNDS):
        table = (_scatter(halves + key + np.uint64(turn << 32)) & halves[-1]).astype(np.uint16)
        left, right = right, left ^ table.take(right)
    return (left.astype(np.int64) << half_bits) | right


def _feistel(values: Keys, half_bits: Keys, keys: Keys) -> Keys:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    free, spare = np.empty_like(values), np.empty_like(values)
    for turn in range(_ROUNDS):
        np.add(right, keys, out=free)
        free += np.uint64(turn << 32)
        _scatter_in_place(free, spare)
        free &= mask
        free ^= left
        left, right, free = right, free, left
    left <<= half_bits
    left |= right
    return left


def _scatter(values: Keys) -> Keys:
    """Scatter 64 bits (splitmix64's finaliser)."""
    values = values.copy()
    _scatter_in_place(values, np.empty_like(values))
    return values


def _scatter_in_place(values: Keys, spare: Keys) -> None:
    # In place, as memory that is allocated anew for each operation costs more than the arithmetic.
    values += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=spare)
        values ^= spare
        values *= np.uint64(factor)
    np.right_shift(values, np.uint64(31), out=spare)
    values ^= spare
