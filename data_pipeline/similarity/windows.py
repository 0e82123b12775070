"""Hashes of windows that stay the same under scale, sign, offset and place in time.

A window is described by the directions of its steps: one bit per step for "up", one for "down";
equal and missing neighbours give neither. Multiplying a series by any factor but 0, adding a
constant, or cutting it elsewhere keeps the description, save for the sign, which swaps the two
words; the hash takes them in an order of their own. Noise, rounding that makes unequal neighbours
equal, and other sampling intervals do change it: copies made so are not recognised.

Ours: hashing runs of steps makes every offset of a series as cheap as a few passes over it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

WINDOW = 64
"""Values of a window, and the most one can have: its 63 steps fit into one machine word."""
MIN_WINDOW = 24
"""The shortest window whose steps still say something."""

_OFFSETS_AT_ONCE = 2**14  # the working arrays then stay in the cache of a core
# Any odd and even numbers without a pattern would do: their difference must be odd, because
# the two words of a window without ties are complements of each other.
_LESS_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MORE_FACTOR = np.uint64(0xC2B2AE3D27D4EB4E)
_LAST_FACTOR = np.uint64(0xD6E8FEB86659FD93)
_HALF_WORD = np.uint64(32)


@dataclass(frozen=True)
class HashedWindows:
    """The windows at consecutive offsets of an array.

    The arrays are used again for the next piece: copy what must last.
    """

    start: int
    """Offset of the first."""
    hashes: Words
    up: Words
    """Bit i: the value rises at step i."""
    down: Words


def hashed_windows(values: np.ndarray, window: int = WINDOW) -> Iterator[HashedWindows]:
    """Hash the window at every offset, a piece at a time.

    Args:
        values: float32 or float64, one axis.
        window: values per window, from `MIN_WINDOW` to `WINDOW`.

    Yields:
        Pieces that cover offsets 0 to len(values) - window in order; none if it is shorter.
    """
    if not 2 <= window <= WINDOW:
        raise ValueError(f"window must be from 2 to {WINDOW} values, got {window}")
    size = min(_OFFSETS_AT_ONCE, max(0, len(values) - window + 1))
    up, down, hashes, spare = (np.empty(size, np.uint64) for _ in range(4))
    for start in range(0, len(values) - window + 1, _OFFSETS_AT_ONCE):
        piece = values[start : start + _OFFSETS_AT_ONCE + window - 1]
        count = len(piece) - window + 1
        _collect_bits(piece[1:] > piece[:-1], window - 1, up[:count])
        _collect_bits(piece[1:] < piece[:-1], window - 1, down[:count])
        _mix(up[:count], down[:count], hashes[:count], spare[:count])
        yield HashedWindows(start, hashes[:count], up[:count], down[:count])


def is_informative(up: Words, down: Words, least: int) -> NDArray[np.bool_]:
    """Whether windows both rise and fall in at least so many steps.

    Windows that are flat, or that only rise or only fall but for a few steps, are all alike.
    """
    enough: NDArray[np.bool_] = np.bitwise_count(up) >= least
    enough &= np.bitwise_count(down) >= least
    return enough


def _collect_bits(steps: np.ndarray, width: int, out: Words) -> None:
    """Put the bits of the `width` steps after each offset into one word, doubling the width."""
    # Steps beyond the last window count as no change; they are masked out of every word.
    padding = np.zeros(len(out) + WINDOW - 1 - len(steps), np.uint8)
    bits: np.ndarray = np.concatenate([steps.view(np.uint8), padding])
    for shift in (1, 2, 4):
        bits = bits[:-shift] | (bits[shift:] << np.uint8(shift))
    bits = bits.astype(np.uint16)
    bits = bits[:-8] | (bits[8:] << np.uint16(8))
    bits = bits.astype(np.uint32)
    bits = bits[:-16] | (bits[16:] << np.uint32(16))
    np.left_shift(bits[32:], np.uint64(32), out=out, dtype=np.uint64)
    out |= bits[:-32]
    out &= np.uint64(2**width - 1)


def _mix(up: Words, down: Words, out: Words, spare: Words) -> None:
    """Hash both words, whichever of them comes first."""
    np.minimum(up, down, out=out)
    np.maximum(up, down, out=spare)
    out *= _LESS_FACTOR
    spare *= _MORE_FACTOR
    out += spare
    np.right_shift(out, _HALF_WORD, out=spare)
    out ^= spare
    out *= _LAST_FACTOR
