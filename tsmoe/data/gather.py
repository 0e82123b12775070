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
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def cut(self, series: Integers, starts: Integers) -> tuple[Tensor, Tensor]:
        """Return the values (0 where nothing was observed) and what was observed, as (B, L).

        The mask may be a constant that cannot be written to.

        Args:
            series: of each window.
            starts: first point of each window; negative where the series is shorter than that.

        Raises:
            IndexError: if a series does not exist, or a window ends after its series.
        """
        addresses, shards = self.corpus.addresses(series, starts, self.length)
        values_BL = self._buffers.take((len(series), self.length), torch.float32)
        is_early = starts < 0
        is_before_shard = addresses < 0
        places = np.where(is_before_shard, _FIRST_ADDRESS, addresses)
        places[is_before_shard] = places.max(initial=_FIRST_ADDRESS)
        if not is_before_shard.all():
            torch.index_select(
                _address_space(self.length),
                0,
                torch.from_numpy((places - _FIRST_ADDRESS) // 4),
                out=values_BL,
            )
        del shards  # were held so that they stay mapped
        for row in np.flatnonzero(is_before_shard):
            known = self.corpus.series(int(series[row]))[: max(0, int(starts[row]) + self.length)]
            values_BL[row, : self.length - len(known)] = 0
            values_BL[row, self.length - len(known) :] = torch.from_numpy(known.copy())
        may_miss = is_early | ~self._is_complete[series]
        if not may_miss.any():
            return values_BL, self._constant(len(series))
        return values_BL, self._mask(values_BL, may_miss, starts)

    def _mask(self, values_BL: Tensor, may_miss: np.ndarray, starts: Integers) -> Tensor:
        """Mark what was observed and put 0 for the rest."""
        # A sum is NaN if a point is; where infinities cancel, a row is looked at for nothing.
        may_miss &= (starts < 0) | values_BL.sum(1).isnan().numpy()
        rows = torch.from_numpy(np.flatnonzero(may_miss))
        if not len(rows):
            return self._constant(len(values_BL))
        observed_BL = self._buffers.take(tuple(values_BL.shape), torch.bool)
        observed_BL.fill_(True)
        some_BL = values_BL[rows]
        first_B1 = torch.from_numpy(np.maximum(-starts, 0))[rows][:, None]
        is_known_BL = (torch.arange(self.length) >= first_B1) & ~some_BL.isnan()
        observed_BL[rows] = is_known_BL
        values_BL[rows] = some_BL.masked_fill_(~is_known_BL, 0)
        return observed_BL

    def _constant(self, num_windows: int) -> Tensor:
        """Return a mask that is True everywhere, the same for all batches."""
        if not self._buffers.is_pinned:
            # One point seen from everywhere: costs nothing, and torch refuses to write to it.
            return torch.ones((), dtype=torch.bool).expand(num_windows, self.length)
        with self._lock:  # page-locked memory is only ever copied from
            if num_windows not in self._all_true:
                mask = self._buffers.take((num_windows, self.length), torch.bool)
                self._all_true[num_windows] = mask.fill_(True)
            return self._all_true[num_windows]


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
