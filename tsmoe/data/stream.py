"""Batches of windows from a stream of series, resumable at any window.

Windows are cut into blocks and dealt from each in random order. A block is a function of where the
stream stood when it began, so a position is that place and a count: nothing that is held needs
saving. Unlike that of a corpus the order depends on the number of ranks, as `datasets` deals rows
to them.

Shapes: B windows, C variates (1), L points of a window.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from data_pipeline.record import SeriesRecord
from data_pipeline.steps.split import train_length
from tsmoe.batch import WindowBatch
from tsmoe.data.mixup import mix_windows
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.permutation import Integers, order_key, uniform
from tsmoe.data.read_ahead import ReadAhead
from tsmoe.data.stream_rows import SeriesStream, unusable
from tsmoe.data.stream_source import StreamConfig, open_stream
from tsmoe.errors import DataError
from tsmoe.ranks import Ranks

# A step may hold many blocks and more are read ahead: so many series can be named, of 100 bytes.
_NAMES_KEPT = 65_536


class Streamed:
    """What a stream has in place of a corpus: a name, an identity, and names of its series."""

    def __init__(self, config: StreamConfig) -> None:
        self.source = open_stream(config)
        self.config = config
        self.path = config.path
        self.fingerprint = self.source.fingerprint(config)
        self._names: dict[int, str] = {}

    def remember(self, names: dict[int, str]) -> None:
        """Take note of the names of the series of a block; the oldest make room for them."""
        self._names |= names
        # Another thread may look a name up meanwhile: a new dictionary, not fewer keys in the old.
        kept = max(_NAMES_KEPT, 2 * len(names))
        if len(self._names) > kept:
            self._names = dict(itertools.islice(self._names.items(), len(self._names) - kept, None))

    def item_id(self, series: int) -> str:
        """Name a series that was in one of the last batches."""
        return self._names.get(series, f"series {series} of {self.path}")


class StreamBatches:
    """Item i is this rank's i-th micro-batch from where it begins; ask for them in order.

    May be used by one thread at a time.
    """

    def __init__(
        self,
        streamed: Streamed,
        *,
        seed: int,
        window_length: int,
        patch_mask: PatchMask,
        mixup_share: float,
        micro_batch_size: int,
        ranks: Ranks,
        first_window: int = 0,
        position: dict[str, Any] | None = None,
    ) -> None:
        """Open the stream at a position; `position` is one that `position_after` gave."""
        self.streamed = streamed
        self.window_length = window_length
        self.patch_mask = patch_mask
        self.mixup_share = mixup_share
        self.micro_batch_size = micro_batch_size
        self.ranks = ranks
        self.first_window = first_window
        self._key, self._mixing_key = (
            order_key(f"{what} {streamed.fingerprint} of rank {ranks.rank}", seed)
            for what in ("windows of", "partners of")
        )
        self._stream = SeriesStream(
            streamed.source,
            streamed.config,
            seed=seed,
            rank=ranks.rank,
            world_size=ranks.size,
            state=None if position is None else position["begin"],
            logs=ranks.is_first,
        )
        self._lock = threading.Lock()
        self._block = _Block(
            number=0 if position is None else position["block"],
            begin=self._stream.state(),
            dealt=0 if position is None else position["dealt"],
        )
        self._fill()
        self._next_item = 0
        self._positions = {0: self._block.position()}

    def __getitem__(self, item: int) -> WindowBatch:
        with self._lock:
            if item != self._next_item:
                raise ValueError(f"batch {self._next_item} of a stream comes next, not {item}")
            batch = self._cut()
            self._next_item += 1
            self._positions[self._next_item] = self._block.position()
        first = self.first_window + (item * self.ranks.size + self.ranks.rank) * batch.num_windows
        positions = first + np.arange(batch.num_windows, dtype=np.int64)
        if self.mixup_share > 0:
            batch = self._mix(batch, positions)
        seen_BCL = self.patch_mask.hide(batch.observed_BCL, positions, self._key)
        return replace(batch, observed_BCL=seen_BCL)

    def position_after(self, num_items: int) -> dict[str, Any]:
        """Return where to go on after so many batches; earlier places are forgotten."""
        with self._lock:
            for number in [number for number in self._positions if number < num_items]:
                del self._positions[number]
            return self._positions[num_items]

    def counts_after(self, num_items: int) -> dict[str, Any]:
        """Return the epoch and the tally as of the block that so many batches have come to."""
        begin = self.position_after(num_items)["begin"]
        return {"epoch": begin["epoch"], **begin["tally"]}

    def _cut(self) -> WindowBatch:
        values, series = [], []
        for _ in range(self.micro_batch_size):
            if self._block.dealt == len(self._block.series):
                self._block = _Block(number=self._block.number + 1, begin=self._stream.state())
                self._fill()
            values.append(self._block.values[self._block.dealt])
            series.append(self._block.series[self._block.dealt])
            self._block.dealt += 1
        return _batch(np.stack(values), np.array(series))

    def _mix(self, batch: WindowBatch, positions: Integers) -> WindowBatch:
        # Neighbours in a block are of different series as a rule: the next window is the partner.
        partners = replace(
            batch, **{n: t.roll(-1, 0) for n, t in vars(batch).items() if t is not None}
        )
        chance, amount = uniform(positions, self._mixing_key)
        shares = np.where(chance < self.mixup_share, amount - 0.5, 0)
        return mix_windows(batch, partners, torch.from_numpy(shares.astype(np.float32)))

    def _fill(self) -> None:
        """Read rows until there are enough windows for the block, and shuffle these."""
        block, config = self._block, self.streamed.config
        values: list[np.ndarray] = []
        series: list[int] = []
        names: dict[int, str] = {}
        begun_in_epoch = self._stream.epoch
        while len(series) < config.mixed_windows:
            if not series and self._stream.epoch > begun_in_epoch + 1:
                raise DataError(
                    f"{self.streamed.path}: no series of the stream can be trained on "
                    f"({self._stream.last_epoch}); shorten model.patch_length or choose another "
                    "data set"
                )
            for record in self._stream.next_row():
                usable = train_length(len(record.values), config.train_fraction)
                reason = unusable(record.values, usable, self.patch_mask.patch_length)
                self._stream.count(reason)
                if reason is not None:
                    continue
                number = self._stream.tally.used  # so that it is never given twice
                names[number] = record.item_id
                for start in self._starts(usable, number):
                    values.append(window_at(record.values, start, self.window_length))
                    series.append(number)
        order = np.random.default_rng([int(self._key), block.number]).permutation(len(series))
        block.values, block.series = [values[i] for i in order], [series[i] for i in order]
        if block.dealt > len(series):
            raise DataError(
                f"{self.streamed.path}: {block.dealt} windows of block {block.number} were dealt "
                f"before, but it has {len(series)} now; the data set has changed: begin another "
                "run=, and pin stream.revision"
            )
        self.streamed.remember(names)

    def _starts(self, usable: int, number: int) -> list[int]:
        """Draw windows of the training part at random: a function of how many series came before.

        About as many as would lie side by side.
        """
        spare = usable - self.window_length
        if spare <= 0:
            return [spare]  # one window, filled up at the left
        count = min(self.streamed.config.windows_per_series, -(-usable // self.window_length))
        generator = np.random.default_rng([int(self._key), number])
        return generator.integers(0, spare + 1, count).tolist()


@dataclass
class _Block:
    """Windows that are dealt in random order."""

    number: int
    begin: dict[str, Any]
    """State of the stream before the first row of the block; Any: JSON of `datasets`."""
    dealt: int = 0
    values: list[np.ndarray] = field(default_factory=list)
    series: list[int] = field(default_factory=list)

    def position(self) -> dict[str, Any]:
        """What is needed to go on from here, as JSON."""
        return {"block": self.number, "begin": self.begin, "dealt": self.dealt}


def window_at(values: np.ndarray, start: int, length: int) -> np.ndarray:
    """Copy a window; where it begins before the series it is NaN."""
    window = np.full(length, np.nan, np.float32)
    window[max(0, -start) :] = values[max(0, start) : start + length]
    return window


def stream_validation(
    streamed: Streamed, *, window_length: int, patch_length: int, max_windows: int,
    batch_size: int, ranks: Ranks,
) -> list[WindowBatch]:  # fmt: skip
    """Cut windows whose targets lie behind the split, of the first series of the stream.

    Every rank has the same number of batches; spare windows have no point that counts.

    Raises:
        DataError: if none of these series has a point behind the split.
    """
    config = streamed.config
    values, begins = [], []
    # So many of each series, evenly spaced, that a long one takes no room from the others.
    of_a_series = -(-max_windows // config.validation_series)
    for record in _first_series(streamed):
        length = len(record.values)
        split = train_length(length, config.train_fraction)
        if length <= patch_length or unusable(record.values, split, 0) is not None:
            continue
        stride = window_length - patch_length
        starts = range(length - window_length, split - window_length, -stride)
        kept = min(len(starts), of_a_series)
        for start in (starts[number * len(starts) // kept] for number in range(kept)):
            values.append(window_at(record.values, start, window_length))
            begins.append(split - start)
    if not values:
        raise DataError(
            f"{streamed.path}: none of its first {config.validation_series} series has a point to "
            "validate on; lower stream.train_fraction or raise stream.validation_series"
        )
    count = min(len(values), max_windows)
    chosen = np.arange(count) * len(values) // count
    batches = []
    for first in range(0, count, batch_size * ranks.size):
        places = first + ranks.rank * batch_size + np.arange(batch_size)
        windows = chosen[np.minimum(places, count - 1)]
        batch = _batch(np.stack([values[i] for i in windows]), np.zeros(batch_size, np.int64))
        position_BL = torch.arange(window_length).expand(batch_size, -1)
        begins_B1 = torch.tensor([begins[i] for i in windows])[:, None]
        counts_BL = (position_BL >= begins_B1) & torch.from_numpy(places < count)[:, None]
        batches.append(replace(batch, is_target_BCL=batch.is_target_BCL & counts_BL[:, None]))
    return batches


def load_stream(
    batches: StreamBatches, *, num_batches: int, num_workers: int, timeout_seconds: float
) -> ReadAhead[WindowBatch]:
    """Iterate over the next micro-batches, read ahead by a thread if `num_workers` is 1."""
    return ReadAhead(
        batches.__getitem__,
        num_items=num_batches,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        what=batches.streamed.path,
    )


def _first_series(streamed: Streamed) -> Iterator[SeriesRecord]:
    """Yield the series of the first rows of the first shards, the same on every rank."""
    stream = SeriesStream(streamed.source, streamed.config)
    left = streamed.config.validation_series
    while left > 0:
        records = stream.next_row()
        if stream.epoch > 0:
            return
        yield from records[:left]
        left -= len(records)


def _batch(values_BL: np.ndarray, series_B: np.ndarray) -> WindowBatch:
    values = torch.from_numpy(values_BL)
    observed_BL = ~values.isnan()
    return WindowBatch(
        values_BCL=values.masked_fill(~observed_BL, 0)[:, None],
        observed_BCL=observed_BL[:, None],
        is_target_BCL=observed_BL[:, None],
        series_ids_B=torch.from_numpy(series_B),
    )
