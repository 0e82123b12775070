"""The order of training windows: shuffled anew each epoch, a function of seed and position."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class ShuffledOrder:
    """Says which window stands at each place of an endless order."""

    def __init__(self, num_windows: int, seed: int) -> None:
        self.num_windows, self.seed = num_windows, seed
        self._last: tuple[int, Integers] | None = None

    def items(self, positions: Integers) -> Integers:
        """Return the windows at some positions, which count on through the epochs."""
        epochs, places = np.divmod(positions, self.num_windows)
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            is_here = epochs == epoch
            items[is_here] = self._shuffled(int(epoch))[places[is_here]]
        return items

    def _shuffled(self, epoch: int) -> Integers:
        if self._last is None or self._last[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            self._last = (epoch, generator.permutation(self.num_windows))
        return self._last[1]


def uniformly_spaced(count: int, wanted: int) -> Integers:
    """Return places of `wanted` of `count` windows, or of all, evenly from the first on.

    Source: few-shot windows of Timer (arXiv 2402.02368), `index * floor(1 / ratio)`. Departure:
    rounded window by window, so that shares that divide nothing reach the end of the part as well.
    """
    wanted = min(wanted, count)
    return np.arange(wanted, dtype=np.int64) * count // max(1, wanted)


def micro_batch_positions(
    step: int, *, rank: int, ranks: int, micro_batch_size: int, global_batch_size: int
) -> list[Integers]:
    """Return the positions of a rank's micro-batches of a step."""
    per_pass = micro_batch_size * ranks
    begins = step * global_batch_size + rank * micro_batch_size
    return [
        begins + number * per_pass + np.arange(micro_batch_size)
        for number in range(global_batch_size // per_pass)
    ]


def share_of_rank(places: Integers, *, rank: int, ranks: int) -> tuple[Integers, NDArray[np.bool_]]:
    """Return a rank's places, as many as any other rank's, and which of them count.

    Where experts are spread over ranks, or weights gathered layer by layer, all ranks must enter
    the model equally often: some places may be there for company only.
    """
    each = -(-len(places) // ranks)
    own = np.arange(each) + each * rank
    return places[np.minimum(own, len(places) - 1)], own < len(places)
