"""Series straight from a `datasets` stream: lanes that are read in turn, each resumable.

A lane is a part of the shards that a rank reads. Reading a few of them in turn mixes what lies in
different files, without holding more of it than what `datasets` reads of each file at a time.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.rows import RowReader
from tsmoe.data.permutation import order_key
from tsmoe.data.stream_source import StreamConfig, StreamSource, reading_errors
from tsmoe.errors import DataError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MAX_LANES = 8
# A small data set has many epochs a second; the log tells of the first, and then now and then.
_SECONDS_BETWEEN_LINES = 60.0


@dataclass(kw_only=True)
class _Lane:
    """Where one lane stands in the present epoch."""

    rows: datasets.IterableDataset
    number: int
    num_rows: int = 0
    is_done: bool = False
    restored: dict[str, Any] | None = None  # Any: JSON of `datasets`
    """Position that was loaded, until the next row is read."""
    iterator: Iterator[Any] | None = None  # Any: one-row Arrow tables; datasets has no types

    def advance(self) -> Any:  # Any: a one-row Arrow table, or None at the end
        """Read the next row."""
        if self.iterator is None:
            if self.restored is not None:
                self.rows.load_state_dict(self.restored)
                self.restored = None
            self.iterator = iter(self.rows)
        table = next(self.iterator, None)
        if table is None:
            self.is_done, self.iterator = True, None
        else:
            self.num_rows += 1
        return table

    def state(self) -> dict[str, Any]:
        """What is needed to go on from here, as JSON."""
        position = self.restored
        if self.num_rows > 0 and not self.is_done and position is None:
            position = copy.deepcopy(self.rows.state_dict())
        return {"num_rows": self.num_rows, "is_done": self.is_done, "rows": position}


@dataclass
class Tally:
    """Series that were used, and those that were not, by reason."""

    used: int
    drops: Counter[str]

    def state(self) -> dict[str, Any]:
        """As JSON; `Tally.of` undoes it."""
        return {"used": self.used, "drops": dict(sorted(self.drops.items()))}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Tally:
        """Undo `state`."""
        return cls(state["used"], Counter(state["drops"]))

    def since(self, earlier: Tally) -> Tally:
        """Return what came after an earlier count."""
        return Tally(self.used - earlier.used, self.drops - earlier.drops)

    def __str__(self) -> str:
        drops = ", ".join(f"{reason} {count}" for reason, count in sorted(self.drops.items()))
        return f"{self.used} series used; not used: {drops or 'none'}"


class SeriesStream:
    """The series of a data set that belong to one rank, one row at a time, epoch after epoch.

    Every row comes once in an epoch. Shards are dealt to the lanes of all ranks; where there are
    fewer shards than ranks, every rank reads all rows and keeps its part of them.

    Args:
        source: the data set.
        config: how it was opened.
        seed: shuffles the shards anew in each epoch; None keeps them as they are.
        rank: of this process.
        world_size: processes that share the data set.
        state: of `state()`, to go on from there.
        logs: whether to say in the log what an epoch was like.

    Raises:
        DataError: if it cannot be read, or has changed.
    """

    def __init__(
        self,
        source: StreamSource,
        config: StreamConfig,
        *,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        logs: bool = False,
    ) -> None:
        self.path = config.path
        self.epoch = 0
        self.tally = Tally(0, Counter())
        self.last_epoch: Tally | None = None
        """The last epoch from its start to its end."""
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._logs, self._logged_at = logs, -_SECONDS_BETWEEN_LINES
        self._rows = source.rows
        if self._rows.num_shards < world_size * MAX_LANES:
            with reading_errors(self.path):
                # Parquet files come apart into their row groups; other files stay whole.
                self._rows = self._rows.reshard()
        self.has_shard_for_each = self._rows.num_shards >= world_size
        per_rank = self._rows.num_shards // (world_size if self.has_shard_for_each else 1)
        self._num_lanes = min(MAX_LANES, per_rank)
        self._turn = 0
        self._before_epoch = Tally.of(self.tally.state())
        self._lanes = self._open_lanes()
        if state is not None:
            self._restore(state)
        if logs and not self.has_shard_for_each:
            logger.warning(
                "%s: %d shards for %d ranks: every rank reads all rows and keeps one in %d, so that"
                " %d times the data set is read; start no more ranks than there are shards, or "
                "build a corpus",
                self.path, self._rows.num_shards, world_size, world_size, world_size,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """What is needed to go on from here, as JSON."""
        return {
            "epoch": self.epoch,
            "turn": self._turn,
            "tally": self.tally.state(),
            "before_epoch": self._before_epoch.state(),
            "lanes": [lane.state() for lane in self._lanes],
        }

    def next_row(self) -> list[SeriesRecord]:
        """Read one row, of the lane whose turn it is.

        Returns:
            its series: one per variate, none if the row is bad, which is counted. `epoch` is that
            of the row.

        Raises:
            DataError: if the data set cannot be read, or has no row.
        """
        while True:
            if all(lane.is_done for lane in self._lanes):
                self._begin_epoch()
            lane = self._lanes[self._turn % self._num_lanes]
            self._turn += 1
            if lane.is_done:
                continue
            with reading_errors(self.path):
                table = lane.advance()
            if table is not None:
                return self._read(lane, table)

    def count(self, reason: str | None) -> None:
        """Note that a series is used, or why it is not."""
        if reason is None:
            self.tally.used += 1
        else:
            self.tally.drops[reason] += 1

    def _begin_epoch(self) -> None:
        if not any(lane.num_rows for lane in self._lanes):
            share = f" for rank {self._rank} of {self._world_size}" if self._world_size > 1 else ""
            raise DataError(
                f"{self.path}: the stream has no row{share}; check stream.path and stream.split"
                + (", or start fewer ranks" if share else "")
            )
        self.last_epoch = self.tally.since(self._before_epoch)
        now = time.monotonic()
        if self._logs and now - self._logged_at >= _SECONDS_BETWEEN_LINES:
            self._logged_at = now
            part = f"the part of rank 0 of {self._world_size}, " if self._world_size > 1 else ""
            logger.info("%s: %sepoch %d: %s", self.path, part, self.epoch, self.last_epoch)
        self.epoch += 1
        self._before_epoch = Tally.of(self.tally.state())
        self._lanes = self._open_lanes()

    def _open_lanes(self) -> list[_Lane]:
        """Open all lanes at the start of the present epoch."""
        from datasets.distributed import split_dataset_by_node

        lanes = []
        for number in range(self._num_lanes):
            if self.has_shard_for_each:
                rows = split_dataset_by_node(
                    self._rows,
                    rank=self._rank * self._num_lanes + number,
                    world_size=self._world_size * self._num_lanes,
                    strategy="shards",
                )
            else:
                rows = split_dataset_by_node(
                    self._rows.shard(num_shards=self._num_lanes, index=number),
                    # Another rank has the first row in each lane, should lanes have few.
                    rank=(self._rank + number) % self._world_size,
                    world_size=self._world_size,
                    strategy="examples",
                )
            rows = rows.with_format("arrow")
            if self._seed is not None:
                # `datasets` shuffles shards by the number of the epoch, from 1 on.
                key = int(order_key(f"shards in epoch {self.epoch}", self._seed))
                rows.set_epoch(1 + key % 2**62)
            lanes.append(_Lane(rows=rows, number=number))
        return lanes

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["lanes"]) != self._num_lanes:
            raise DataError(
                f"{self.path}: had {len(state['lanes'])} shards to read in turn and has "
                f"{self._num_lanes} now; the data set has changed: begin another run="
            )
        self.epoch, self._turn = state["epoch"], state["turn"]
        self.tally, self._before_epoch = map(Tally.of, (state["tally"], state["before_epoch"]))
        self._lanes = self._open_lanes()
        for lane, saved in zip(self._lanes, state["lanes"], strict=True):
            lane.num_rows, lane.is_done = saved["num_rows"], saved["is_done"]
            lane.restored = saved["rows"]

    def _read(self, lane: _Lane, table: Any) -> list[SeriesRecord]:
        name = f"{Path(self.path).stem}_{lane.number}"
        reader = RowReader(where=self.path, name=name, first_row=lane.num_rows - 1)
        records = []
        for batch in table.to_batches():
            for item in reader.read(batch):
                if isinstance(item, Drop):
                    self.count(item.reason)
                else:
                    records.append(item)
        return records


def unusable(values: np.ndarray, train_length: int, patch_length: int) -> str | None:
    """Say why a series is of no use for training, in the words of the corpus; None if it is."""
    training = values[:train_length]
    observed = training[~np.isnan(training)]
    if train_length <= patch_length:
        return "too_short"
    if np.isinf(values).any():
        return "infinite"
    if not len(observed):
        return "no_observation"
    return "constant" if observed.min() == observed.max() else None
