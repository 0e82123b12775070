"""Sketches: a few numbers per series by which copies are found without reading all values again.

A sketch holds a digest of the exact values, and the anchors of the series: windows whose hash lies
below a limit. Since windows are hashed by content, two series that share a stretch have the anchors
of that stretch in common, wherever it lies in each and whatever its scale. The limit depends on the
length alone: of two series the one with the lower limit decides which anchors both must have.

Ours. One .npy file of 64-bit words per block of a build: header, lengths, digests, and all anchors
sorted by hash, so that a range of hashes is one slice of the memory map.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.similarity.windows import WINDOW, Words, hashed_windows, is_informative

ANCHOR_SHARE = 1 / 64
"""Share of its windows that are anchors of a series, except where it has few or many."""
MIN_ANCHORS = 16
"""Of short series more windows are taken, until they have about so many."""
MAX_ANCHORS = 1024
"""Of long series fewer, until they have no more than about so many."""

_LEAST_STEPS = WINDOW // 8
_VERSION = 1
_HEADER_WORDS = 3
_OFFSET_BITS = np.uint64(40)  # of a word that holds row and offset
_DIGEST_STEPS = 2**16


def anchor_limit(length: int) -> np.uint64:
    """Return the highest hash of an anchor of a series of this length."""
    windows = max(1, length - WINDOW + 1)
    share = min(max(ANCHOR_SHARE, MIN_ANCHORS / windows), MAX_ANCHORS / windows, 1.0)
    return np.uint64(min(int(share * 2.0**64), 2**64 - 1))


class SketchWriter:
    """Sketches the series of a block, in the order in which it keeps them.

    Args:
        anchors: whether anchors are wanted; without them only exact copies can be found.
    """

    def __init__(self, *, anchors: bool = True) -> None:
        self._wants_anchors = anchors
        self._lengths: list[int] = []
        self._digests: list[bytes] = []
        self._hashes: list[Words] = []
        self._places: list[Words] = []

    def add(self, values: np.ndarray) -> None:
        """Sketch one series: float32, one axis, NaN where nothing was observed."""
        if self._wants_anchors:
            hashes, offsets = _anchors(values)
            row = np.uint64(len(self._lengths))
            self._hashes.append(hashes)
            self._places.append(row << _OFFSET_BITS | offsets)
        self._lengths.append(len(values))
        self._digests.append(_digest(values))

    def write(self, path: Path) -> None:
        """Write all sketches to a file."""
        empty = np.empty(0, np.uint64)
        hashes = np.concatenate([empty, *self._hashes])
        places = np.concatenate([empty, *self._places])
        order = np.lexsort((places, hashes))
        header = np.array([_VERSION, len(self._lengths), len(hashes)], np.uint64)
        lengths = np.array(self._lengths, np.uint64)
        digests = np.frombuffer(b"".join(self._digests), np.uint64)
        words = np.concatenate([header, lengths, digests, hashes[order], places[order]])
        with path.open("wb") as file:
            np.save(file, words, allow_pickle=False)


class Sketch:
    """The sketches of one block, memory-mapped.

    Attributes:
        lengths: points of each series.
        digests: two words per series, equal where all values are.
        hashes: of all anchors, ascending.

    Args:
        path: as written by `SketchWriter`.

    Raises:
        DataError: if it is something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            words: Words = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: the sketches cannot be read ({error}); build again"
            ) from error
        rows, anchors = (int(word) for word in words[1:_HEADER_WORDS]) if len(words) > 2 else (0, 0)
        sizes = (_HEADER_WORDS, rows, 2 * rows, anchors, anchors)
        if words.dtype != np.uint64 or len(words) != sum(sizes) or words[0] != _VERSION:
            raise DataError(f"{path}: holds no sketches of this version; build again")
        _, self.lengths, digests, self.hashes, self._places = np.split(words, np.cumsum(sizes[:-1]))
        self.digests = digests.reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def anchors(self, first: int, end: int) -> tuple[Words, NDArray[np.int64], NDArray[np.int64]]:
        """Copy some anchors: their hashes, the rows of their series, and their offsets there."""
        places = self._places[first:end]
        rows = (places >> _OFFSET_BITS).astype(np.int64)
        offsets = (places & np.uint64(2 ** int(_OFFSET_BITS) - 1)).astype(np.int64)
        return np.array(self.hashes[first:end]), rows, offsets


def _anchors(values: np.ndarray) -> tuple[Words, Words]:
    """Pick the anchors of a series: hashes, each once, and where each stands first."""
    limit = anchor_limit(len(values))
    hashes, offsets = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for piece in hashed_windows(values):
        chosen = np.flatnonzero(piece.hashes <= limit)
        tells = is_informative(piece.up[chosen], piece.down[chosen], _LEAST_STEPS)
        chosen = chosen[tells]
        hashes.append(piece.hashes[chosen])
        offsets.append((chosen + piece.start).astype(np.uint64))
    unique, firsts = np.unique(np.concatenate(hashes), return_index=True)
    return unique, np.concatenate(offsets)[firsts]


def _digest(values: np.ndarray) -> bytes:
    """Hash the exact values: -0 is 0, and all kinds of NaN are one."""
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, len(values), _DIGEST_STEPS):
        piece = values[start : start + _DIGEST_STEPS].astype(np.float32) + np.float32(0)
        piece[np.isnan(piece)] = np.nan
        digest.update(piece.data)
    return digest.digest()
