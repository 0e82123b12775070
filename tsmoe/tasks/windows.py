"""Windows of all variates, cut from segments: recordings that follow one another in time.

Shapes: B windows, C variates, L rows of a segment, W steps of a window, R rows of all segments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tsmoe.batch import WindowBatch

Floats = NDArray[np.float32]

# Deviations from the mean of the train part.
_FURTHEST = 1e6
Integers = NDArray[np.int64]


class WindowStore:
    """Cuts windows that may begin before their segment does: what is not there is NaN."""

    def __init__(self, segments_LC: Sequence[Floats], *, lead: int) -> None:
        """Put segments into one array.

        Args:
            segments_LC: of as many variates each; NaN where not observed.
            lead: rows that a window may begin before its segment.
        """
        num_variates = segments_LC[0].shape[1]
        frame_LC = np.full((lead, num_variates), np.nan, np.float32)
        parts, self.offsets, end = [], [], 0
        for segment_LC in segments_LC:
            parts += [frame_LC, segment_LC.astype(np.float32, copy=False)]
            self.offsets.append(end + lead)
            end += lead + len(segment_LC)
        self._rows_RC = np.concatenate(parts)
        self.num_variates = num_variates

    def starts(self, segment: int, first: int, last: int, *, step: int = 1) -> Integers:
        """Return windows of a segment that begin at its rows `first` to `last`, both included."""
        return self.offsets[segment] + np.arange(first, last + 1, step, dtype=np.int64)

    def cut(self, starts_B: Integers, length: int) -> Floats:
        """Return windows_BCW."""
        rows_BW = starts_B[:, None] + np.arange(length)
        return np.ascontiguousarray(self._rows_RC[rows_BW].transpose(0, 2, 1))

    def segment_of(self, start: int) -> int:
        """Return the segment that a window which begins there ends in."""
        return max(0, int(np.searchsorted(self.offsets, start, side="right")) - 1)

    def count_recorded(self, starts_M: Integers, first: int, last: int) -> Integers:
        """Count recorded values of each window's steps `first` to `last`, the last excluded."""
        is_recorded_R = np.isfinite(self._rows_RC).sum(axis=1)
        total_R = np.concatenate(([0], is_recorded_R.cumsum()))
        return total_R[starts_M + last] - total_R[starts_M + first]

    @property
    def fingerprint(self) -> str:
        """Hash of all values."""
        return hashlib.sha256(np.ascontiguousarray(self._rows_RC).tobytes()).hexdigest()


def bounded(scaled: NDArray[np.floating]) -> Floats:
    """Return scaled values as float32, none further from the mean than squares of it can bear.

    A value that is out of all proportion stays the largest there is; it must not become infinite,
    which would count as not recorded.
    """
    with np.errstate(over="ignore"):
        return np.clip(scaled, -_FURTHEST, _FURTHEST).astype(np.float32)


def points_batch(
    values_BCW: Floats,
    *,
    shown_BCW: NDArray[np.bool_],
    target_BCW: NDArray[np.bool_],
    ids_B: Integers,
    task: str,
) -> WindowBatch:
    """Put windows together whose points are predicted; what is not recorded is neither."""
    is_recorded_BCW = np.isfinite(values_BCW)
    return WindowBatch(
        values_BCL=torch.from_numpy(np.where(is_recorded_BCW, values_BCW, 0)),
        observed_BCL=torch.from_numpy(is_recorded_BCW & shown_BCW),
        is_target_BCL=torch.from_numpy(is_recorded_BCW & target_BCW),
        series_ids_B=torch.from_numpy(np.ascontiguousarray(ids_B)),
        task=task,
    )


def generator_of(seed: int, *place: int) -> np.random.Generator:
    """Return random numbers that depend on what they are for, not on ranks or order."""
    return np.random.default_rng((seed, *place))
