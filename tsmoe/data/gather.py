"""Cut windows out of the memory maps of a corpus, near the speed of memory.

Three things cost more than the copy itself, and are avoided: a read for each shard (all shards are
read through one view of the address space), memory that is mapped anew for each batch (buffers are
used again), and passes over values that cannot be missing (only windows whose sum is NaN are
looked at closer, and none of series that were recorded in full).

Shapes: B windows, L points of a window.
"""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.record import SeriesBatch
from data_pipeline.shards.reader import Corpus
from tsmoe.data.permutation import Integers

# Addresses of user space end below 2**48 on the machines that torch runs on; the first page is
# never mapped, and an array may not begin at address 0.
_FIRST_ADDRESS, _LAST_ADDRESS = 4096, 2**48
# The share of observed points is stored as float32: of longer series, one gap does not show in it.
_EXACT_LENGTH = 2**24


class Buffers:
    """Memory of batches that is used again once nobody holds a tensor of it.

    A batch owns its memory as long as it, or anything made of it without a copy, is held, so it
    never changes under the one who holds it. May be used by several threads.
    """

    def __init__(self, *, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned
        self._free: dict[Any, list[np.ndarray]] = {}  # Any: shape and dtype

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor with arbitrary content."""
        if self.is_pinned:
            # torch keeps page-locked memory for us, and knows when a copy from it has ended.
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(shape, dtype=dtype).numpy()
        # The tensor's storage holds this view, and nobody else does: it goes with the storage.
        view = memory[:]
        weakref.finalize(view, free.append, memory).atexit = False  # type: ignore[misc]
        return torch.from_numpy(view)


@dataclass(frozen=True)
class PlacedWindows:
    """Windows, and what was found out of each before it is read."""

    series: Integers
    starts: Integers
    """First point of each; negative where the series is shorter than a window."""
    addresses: Integers | None
    """In memory; negative where a window begins before its shard. None: asked for anew by each
    reader, as the shards of a remote corpus come and go."""
    may_miss: NDArray[np.bool_]
    """Whether some point may not have been observed."""

    def part(self, rows: slice) -> PlacedWindows:
        """Return some of the windows."""
        return PlacedWindows(
            self.series[rows],
            self.starts[rows],
            None if self.addresses is None else self.addresses[rows],
            self.may_miss[rows],
        )

    def without(self, is_lost: NDArray[np.bool_]) -> PlacedWindows:
        """Return the windows with no address for those that are lost."""
        addresses = self.addresses
        return PlacedWindows(
            self.series,
            self.starts,
            None if addresses is None else np.where(is_lost, -1, addresses),
            self.may_miss | is_lost,
        )


class WindowGather:
    """Cuts windows of one length out of a corpus."""

    def __init__(self, corpus: Corpus, length: int, *, is_pinned: bool = False) -> None:
        self.corpus = corpus
        self.length = length
        self._buffers = Buffers(is_pinned=is_pinned)
        self._is_complete = corpus.observed_fractions() == 1
        self._is_complete &= corpus.lengths < _EXACT_LENGTH
        self._all_true: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def place(self, series: Integers, starts: Integers) -> PlacedWindows:
        """Find out once for many windows what `cut` must know of each.

        Args:
            series: of each window.
            starts: first point of each window; negative where the series is shorter than that.

        Raises:
            IndexError: if a series does not exist, or a window ends after its series.
        """
        addresses = None
        if self.corpus.max_resident_shards is None:  # a local corpus stays where it is
            addresses, _ = self.corpus.addresses(series, starts, self.length)
        return PlacedWindows(
            series=series,
            starts=starts,
            addresses=addresses,
            may_miss=(starts < 0) | ~self._is_complete[series],
        )

    def cut(self, windows: PlacedWindows) -> tuple[Tensor, Tensor]:
        """Return the values (0 where nothing was observed) and what was observed, as (B, L).

        Of a lost shard nothing was observed. The mask may be a constant: it is not to be written
        to.
        """
        is_lost = self.corpus.is_lost(windows.series)
        if is_lost is not None:  # a shard may have been lost since the windows were placed
            windows = windows.without(is_lost)
        series, starts, addresses = windows.series, windows.starts, windows.addresses
        shards: list[SeriesBatch] = []
        if addresses is None:
            addresses, shards = self.corpus.addresses(series, starts, self.length)
        values_BL = self._buffers.take((len(series), self.length), torch.float32)
        if addresses.min(initial=0) >= 0:
            _read(addresses, out=values_BL)  # the usual case: a single copy
        else:
            self._read_some(windows, addresses, out=values_BL)
        del shards  # were held so that what is read stays mapped
        if not windows.may_miss.any():
            return values_BL, self._constant(len(series))
        return values_BL, self._mask(values_BL, windows)

    def _read_some(self, windows: PlacedWindows, addresses: Integers, *, out: Tensor) -> None:
        """Read windows of which some begin before their shard does."""
        rows = np.flatnonzero(addresses >= 0)
        read_BL = out.new_empty(len(rows), self.length)
        _read(addresses[rows], out=read_BL)
        out[torch.from_numpy(rows)] = read_BL
        is_lost = self.corpus.is_lost(windows.series)
        for row in np.flatnonzero(addresses < 0):
            if is_lost is not None and is_lost[row]:
                out[row] = torch.nan
                continue
            end = max(0, int(windows.starts[row]) + self.length)
            out[row, : self.length - end] = 0
            known = self.corpus.series(int(windows.series[row]))[:end]
            out[row, self.length - end :] = torch.from_numpy(known.copy())

    def _mask(self, values_BL: Tensor, windows: PlacedWindows) -> Tensor:
        """Mark what was observed and put 0 for the rest."""
        # A sum is NaN if a point is; where infinities cancel, a row is looked at for nothing.
        starts = windows.starts
        has_gap = (starts < 0) | values_BL.sum(1).isnan().numpy()
        found = np.flatnonzero(has_gap & windows.may_miss)
        if not found.size:
            return self._constant(len(values_BL))
        # numpy takes a sixth of torch's time for these few rows.
        values, observed_BL = values_BL.numpy(), self._buffers.take(values_BL.shape, torch.bool)
        some = values[found]
        is_missing = np.isnan(some)
        if (starts[found] < 0).any():
            is_missing |= np.arange(self.length) < -starts[found][:, None]
        np.copyto(some, 0, where=is_missing)
        values[found] = some
        observed_BL.fill_(True)
        observed_BL.numpy()[found] = np.logical_not(is_missing, out=is_missing)
        return observed_BL

    def _constant(self, num_windows: int) -> Tensor:
        """Return a mask that is True everywhere, the same for all batches."""
        if not self._buffers.is_pinned:
            # One point seen from everywhere costs nothing; torch refuses to write to all of it.
            return torch.ones((), dtype=torch.bool).expand(num_windows, self.length)
        with self._lock:  # page-locked memory is only ever copied from
            if num_windows not in self._all_true:
                mask = self._buffers.take((num_windows, self.length), torch.bool)
                self._all_true[num_windows] = mask.fill_(True)
            return self._all_true[num_windows]


def _read(addresses: Integers, *, out: Tensor) -> None:
    """Copy what lies at these addresses, a window for each row."""
    windows = torch.from_numpy((addresses - _FIRST_ADDRESS) >> 2)
    torch.index_select(_address_space(out.shape[1]), 0, windows, out=out)


@functools.lru_cache(maxsize=8)
def _address_space(length: int) -> Tensor:
    """View all memory as windows, one at each float32; only what is mapped may be read.

    With one array for all shards a batch is one gather, however many shards its windows lie in;
    with one gather for each shard, those of 512 windows would cost as much as the copy of 5,000.
    """

    class Space:
        __array_interface__ = {  # noqa: RUF012 - numpy's protocol
            "version": 3,
            "typestr": "<f4",
            "data": (_FIRST_ADDRESS, False),
            "shape": ((_LAST_ADDRESS - _FIRST_ADDRESS) // 4 - length, length),
            "strides": (4, 4),
        }

    return torch.from_numpy(np.asarray(Space()))
