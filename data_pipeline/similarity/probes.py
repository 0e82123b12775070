"""The windows of evaluation tables that are looked for in a corpus, and finding them by hash.

W values of a window
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.similarity.match import signatures
from data_pipeline.similarity.windows import WINDOW, Words, hashed_windows, is_informative

Places = NDArray[np.int64]

_FILTER_BITS = (16, 25)
"""Least and most bits of a hash that the filter looks at: 64 KiB to 32 MiB."""
_WINDOWS_AT_ONCE = 2**13
_LEAST_STEPS = 3
"""Rises, and falls, that a window must have."""


@dataclass(frozen=True)
class ProbeCounts:
    """Windows of each variate, by what became of them; int64 arrays over the variates."""

    windows: Places
    uninformative: Places


class Probes:
    """Windows of some variates, end to end and one over each variate's end, sorted by hash.

    Attributes:
        window: values per window.
        places: where each window begins among all values.
        variates: which variate it is of.
        counts: windows of every variate.

    Args:
        values: float32, the variates one after another.
        ends: where each variate begins and ends: variate i is `values[ends[i]:ends[i + 1]]`.
        chosen: the variates whose windows are wanted, each at least `window` long, in order.
        window: values per window.
    """

    def __init__(
        self, values: np.ndarray, ends: Sequence[int], chosen: Sequence[int], window: int
    ) -> None:
        self.window = window
        self._values = values
        places, variates = _place(ends, chosen, window)
        hashes, keep = _hash_at(values, places, window)
        keep &= self._tell(places, keep)
        num_variates = len(ends) - 1
        total = np.bincount(variates, minlength=num_variates)
        kept = np.bincount(variates[keep], minlength=num_variates)
        self.counts = ProbeCounts(windows=total, uninformative=total - kept)

        hashes, places, variates = hashes[keep], places[keep], variates[keep]
        self._hashes, numbers = np.unique(hashes, return_inverse=True)
        keys = self._keys(numbers, self._signatures(places))
        order = np.argsort(keys, kind="stable")
        self.places, self.variates, self._sorted_keys = places[order], variates[order], keys[order]
        least, most = _FILTER_BITS
        bits = min(max(len(self._hashes).bit_length() + 5, least), most)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(2**bits, np.bool_)
        self._filter[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        return len(self.places)

    def find(self, hashes: Words) -> tuple[Places, Places]:
        """Find the hashes that some window has.

        Returns:
            Their positions, and the number of each among the different hashes of the windows.
        """
        leading = (hashes >> self._shift).view(np.int64)
        positions = np.flatnonzero(np.take(self._filter, leading))
        wanted = hashes[positions]
        numbers = np.searchsorted(self._hashes, wanted)
        is_there = self._hashes[np.minimum(numbers, len(self._hashes) - 1)] == wanted
        return positions[is_there], numbers[is_there]

    def like(
        self, numbers: Places, signatures: np.ndarray, slacks: np.ndarray
    ) -> tuple[Places, Places]:
        """Find the windows of each hash that are worth comparing: popular hashes have many.

        Args:
            numbers: of the hashes, as `find` returns them.
            signatures: of the other windows, see `match.signatures`.
            slacks: by how much theirs may differ.

        Returns:
            Where the windows of each number begin and end; a window is a position in `places`.
        """
        lowest = self._keys(numbers, np.maximum(signatures - slacks, 0.0))
        highest = self._keys(numbers, signatures + slacks)
        return (
            np.searchsorted(self._sorted_keys, lowest, side="left"),
            np.searchsorted(self._sorted_keys, highest, side="right"),
        )

    def values_of(self, probes: Places) -> np.ndarray:
        """Copy the values of some windows, one row each."""
        return self._rows(self.places[probes])

    def _rows(self, places: Places) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(self._values, self.window)
        rows: np.ndarray = windows[places]
        return rows

    def _signatures(self, places: Places) -> NDArray[np.float64]:
        found = np.empty(len(places))
        for start in range(0, len(places), _WINDOWS_AT_ONCE):
            some = slice(start, start + _WINDOWS_AT_ONCE)
            found[some] = signatures(self._rows(places[some]))[0]
        return found

    @staticmethod
    def _keys(numbers: Places, signatures: np.ndarray) -> NDArray[np.float64]:
        """Sort keys: by hash, then by signature, which is at most the root of `WINDOW`."""
        keys: NDArray[np.float64] = numbers * (2.0 * WINDOW) + signatures
        return keys

    def _tell(self, places: Places, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether the values of windows can be told from those of other recordings."""
        tells = np.zeros(len(places), np.bool_)
        numbers = np.flatnonzero(chosen)
        for start in range(0, len(numbers), _WINDOWS_AT_ONCE):
            some = numbers[start : start + _WINDOWS_AT_ONCE]
            tells[some] = _is_distinctive(self._rows(places[some]))
        return tells


def _place(
    ends: Sequence[int], chosen: Sequence[int], window: int
) -> tuple[Places, NDArray[np.int32]]:
    """Lay windows end to end over each variate, and one over its end."""
    places, variates = [], []
    for variate in chosen:
        first, end = ends[variate], ends[variate + 1]
        own = np.arange(first, end - window + 1, window)
        if own[-1] != end - window:
            own = np.append(own, end - window)
        places.append(own)
        variates.append(np.full(len(own), variate, np.int32))
    if not places:
        return np.empty(0, np.int64), np.empty(0, np.int32)
    return np.concatenate(places), np.concatenate(variates)


def _hash_at(values: np.ndarray, places: Places, window: int) -> tuple[Words, NDArray[np.bool_]]:
    """Return the hash of each window, and whether its steps are informative."""
    hashes = np.empty(len(places), np.uint64)
    tells = np.empty(len(places), np.bool_)
    for piece in hashed_windows(values, window):
        bounds = np.searchsorted(places, [piece.start, piece.start + len(piece.hashes)])
        here = slice(*bounds)
        at = places[here] - piece.start
        hashes[here] = piece.hashes[at]
        tells[here] = is_informative(piece.up[at], piece.down[at], _LEAST_STEPS)
    return hashes, tells


def _is_distinctive(rows_BW: np.ndarray) -> NDArray[np.bool_]:
    """Whether windows hold enough different values and do not just repeat themselves.

    Square waves, counters and one-hot columns of unrelated machines are equal up to scale.
    """
    window = rows_BW.shape[1]
    sorted_BW = np.sort(rows_BW, axis=1)  # missing values come last, and are all different
    is_new_BW = (np.diff(sorted_BW, axis=1) != 0) & ~np.isnan(sorted_BW[:, 1:])
    tells: NDArray[np.bool_] = is_new_BW.sum(axis=1) + 1 >= window // 8
    filled_BW = np.nan_to_num(rows_BW, nan=np.inf)
    for period in range(2, window // 2 + 1):
        tells &= (filled_BW[:, period:] != filled_BW[:, :-period]).any(axis=1)
    return tells
