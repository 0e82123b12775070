"""Which windows the next micro-batches of a rank hold, drawn for many batches at once.

Drawing is a few hundred small operations of numpy, whatever the number of windows: for one batch
alone they would take longer than to copy it.
"""

from __future__ import annotations

import threading

import numpy as np

from tsmoe.data.gather import PlacedWindows, WindowGather
from tsmoe.data.order import WindowOrder
from tsmoe.data.permutation import Integers
from tsmoe.data.windows import WindowIndex
from tsmoe.ranks import Ranks

# Windows drawn at a time: some five milliseconds of work.
_WINDOWS_AT_A_TIME = 65536
# The one at hand, that of a worker that is a few batches behind, and one that is prepared.
_STRETCHES_KEPT = 3


class WindowPlan:
    """Item i is the windows of a rank's i-th micro-batch after `first_window`.

    Micro-batch m of a step takes windows m*M*W + r*M onwards of the step, for rank r of W and M
    windows a micro-batch, so that a step holds the same windows for any number of ranks. May be
    used by several threads.
    """

    def __init__(
        self,
        gather: WindowGather,
        index: WindowIndex,
        order: WindowOrder,
        *,
        micro_batch_size: int,
        ranks: Ranks,
        first_window: int,
    ) -> None:
        self.order = order
        self._gather = gather
        self._index = index
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = ranks.rank, ranks.size
        self._first_window = first_window
        self._batches_at_a_time = max(1, _WINDOWS_AT_A_TIME // micro_batch_size)
        self._stretches: dict[int, tuple[Integers, PlacedWindows]] = {}
        self._lock = threading.Lock()

    def __getitem__(self, item: int) -> tuple[Integers, PlacedWindows]:
        """Return the positions in the order of the run of a micro-batch's windows, and them."""
        number, place = divmod(item, self._batches_at_a_time)
        stretch = self._stretches.get(number)
        if stretch is None:
            with self._lock:
                stretch = self._stretch(number)
        positions, windows = stretch
        part = slice(place * self._micro_batch_size, (place + 1) * self._micro_batch_size)
        return positions[part], windows.part(part)

    def prepare(self, item: int) -> None:
        """Draw what comes after the stretch of an item, once half of the stretch is through.

        Called between items by one of several workers, so that the others never wait for it.
        """
        number, place = divmod(item, self._batches_at_a_time)
        is_due = place >= self._batches_at_a_time // 2 and number + 1 not in self._stretches
        if is_due and self._lock.acquire(blocking=False):
            try:
                self._stretch(number + 1)
            finally:
                self._lock.release()

    def _stretch(self, number: int) -> tuple[Integers, PlacedWindows]:
        """Return a stretch, drawing it if need be; under the lock."""
        if number not in self._stretches:
            drawn = self._draw(number)
            while len(self._stretches) >= _STRETCHES_KEPT:
                del self._stretches[next(iter(self._stretches))]
            self._stretches[number] = drawn
        return self._stretches[number]

    def _draw(self, number: int) -> tuple[Integers, PlacedWindows]:
        items = np.arange(self._batches_at_a_time) + number * self._batches_at_a_time
        firsts = (items * self._world_size + self._rank) * self._micro_batch_size
        within = np.arange(self._micro_batch_size)
        positions = (self._first_window + firsts[:, None] + within).reshape(-1)
        _, series, starts = self._index.locate(*self.order.draw(positions))
        if self._gather.corpus.max_resident_shards is not None:
            self._gather.corpus.prefetch(self._shards_soon(series, int(positions[-1])))
        return positions, self._gather.place(series, starts)

    def _shards_soon(self, series: Integers, position: int) -> list[int]:
        """Return the shards of these windows, and those that windows after a position come from."""
        now = np.unique(self._gather.corpus.series_shards[series]).tolist()
        if self.order.blocks is None:
            return now
        return list(dict.fromkeys([*now, *self.order.shards_ahead(position).tolist()]))
