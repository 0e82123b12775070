"""Series straight from a `datasets` stream: lanes that are read in turn, each resumable.

A lane is a part of the shards of the data set. Reading a few of them in turn mixes what lies in
different files, without holding any of it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.rows import TARGET, RowReader
from tsmoe.config import Section
from tsmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

MAX_LANES = 8


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Section):
    """Train on a data set of the Hugging Face hub as it comes, without a corpus on disk.

    For trying a data set. A corpus is curated, mixed by source, and the same for any number of
    ranks; a stream is none of that.
    """

    path: str
    """Name on the hub, such as thuml/UTSD; or a local folder of Parquet or Arrow files, or one
    saved by `datasets`. One series a row, its values in `target`."""
    name: str | None = None
    """Configuration of the data set, such as UTSD-1G."""
    split: str = "train"
    revision: str | None = None
    """Commit or tag on the hub; pin it, so that a run that goes on reads the same data."""
    train_fraction: float = 0.9
    """Share of every series, from its start, that is trained on."""
    windows_per_series: int = 16
    """Windows drawn from a series each time it comes by, at most: long ones would fill batches."""
    mixed_windows: int = 2048
    """Windows that are held and dealt in random order, of `window_length` * 4 bytes each."""
    validation_series: int = 64
    """Series at the beginning of the stream whose ends are validated on."""

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be in (0, 1], got {self.train_fraction}")
        for name in ("windows_per_series", "mixed_windows", "validation_series"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(kw_only=True)
class _Lane:
    """Where one lane stands."""

    rows: datasets.IterableDataset
    number: int
    epoch: int = 0
    num_rows: int = 0
    """Rows read in this epoch."""
    drops: Counter[str] = field(default_factory=Counter)
    restored: dict[str, Any] | None = None  # Any: JSON of `datasets`
    """Position that was loaded, until the first row is read."""
    iterator: Iterator[Any] | None = None  # Any: one-row Arrow tables; datasets has no types

    def state(self) -> dict[str, Any]:
        """What is needed to go on from here, as JSON."""
        position = self.restored
        if self.num_rows > 0 and position is None:
            position = copy.deepcopy(self.rows.state_dict())
        return {
            "epoch": self.epoch,
            "num_rows": self.num_rows,
            "drops": dict(self.drops),
            "rows": position,
        }


class SeriesStream:
    """The series of a data set that belong to one rank, one row at a time, epoch after epoch.

    Args:
        config: which data set.
        rank: of this process.
        world_size: processes that share the data set.
        state: of `state()`, to go on from there.
        logs: whether to say in the log that a part has come to its end.

    Raises:
        DataError: if it cannot be reached or read, has no column `target`, or has changed.
    """

    def __init__(
        self,
        config: StreamConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        logs: bool = True,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.path = config.path
        self._log_level = logging.INFO if logs else logging.DEBUG
        self._dataset = split_dataset_by_node(open_rows(config), rank, world_size)
        self._num_lanes = min(MAX_LANES, self._dataset.num_shards)
        self._lanes = [self._open_lane(number) for number in range(self._num_lanes)]
        self.turn = 0
        self.last_drops: dict[str, int] = {}
        """Series that were not used when a lane was last read to its end, by reason."""
        if state is not None:
            self._restore(state)

    def state(self) -> dict[str, Any]:
        """What is needed to go on from here, as JSON."""
        return {"turn": self.turn, "lanes": [lane.state() for lane in self._lanes]}

    def next_row(self) -> tuple[int, int, int, list[SeriesRecord]]:
        """Read one row, of the lane whose turn it is.

        Returns:
            lane, epoch and number of the row in its lane, and its series: one per variate, none if
            the row is bad. The epoch of a lane ends before its first row comes again.

        Raises:
            DataError: if the data set cannot be read, or all lanes are empty.
        """
        for _ in range(2 * self._num_lanes):
            lane = self._lanes[self.turn % self._num_lanes]
            self.turn += 1
            table = self._advance(lane)
            if table is not None:
                place = (lane.number, lane.epoch, lane.num_rows)
                lane.num_rows += 1
                return *place, self._read(lane, table, place[2])
        raise DataError(f"{self.path}: the stream is empty; check split and path")

    @property
    def epoch(self) -> int:
        """Times that all of the data set has been read."""
        return min(lane.epoch for lane in self._lanes)

    def count_drop(self, lane: int, reason: str) -> None:
        """Note that a series of a lane is not used, and why."""
        self._lanes[lane].drops[reason] += 1

    def _open_lane(self, number: int) -> _Lane:
        lane = self._dataset.shard(num_shards=self._num_lanes, index=number)
        return _Lane(rows=lane.with_format("arrow"), number=number)

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["lanes"]) != self._num_lanes:
            raise DataError(
                f"{self.path}: had {len(state['lanes'])} shards to read in turn and has "
                f"{self._num_lanes} now; the data set has changed: begin another run="
            )
        self.turn = state["turn"]
        for lane, saved in zip(self._lanes, state["lanes"], strict=True):
            lane.epoch, lane.num_rows = saved["epoch"], saved["num_rows"]
            lane.drops = Counter(saved["drops"])
            lane.restored = saved["rows"]

    def _advance(self, lane: _Lane) -> Any:  # Any: a one-row Arrow table, or None at the end
        with reading_errors(self.path):
            if lane.iterator is None:
                if lane.restored is not None:
                    lane.rows.load_state_dict(lane.restored)
                    lane.restored = None
                lane.iterator = iter(lane.rows)
            table = next(lane.iterator, None)
        if table is None:
            logger.log(
                self._log_level,
                "%s: part %d has come to its end, epoch %d, %d rows; not used: %s",
                self.path, lane.number, lane.epoch, lane.num_rows,
                ", ".join(f"{k} {v}" for k, v in sorted(lane.drops.items())) or "none",
            )  # fmt: skip
            self.last_drops = dict(lane.drops)
            fresh = self._open_lane(lane.number)
            fresh.epoch = lane.epoch + 1
            self._lanes[lane.number] = fresh
        return table

    def _read(self, lane: _Lane, table: Any, row: int) -> list[SeriesRecord]:
        name = Path(self.path).name
        reader = RowReader(where=self.path, name=f"{name}_{lane.number}", first_row=row)
        records = []
        for batch in table.to_batches():
            for item in reader.read(batch):
                if isinstance(item, Drop):
                    self.count_drop(lane.number, item.reason)
                else:
                    records.append(item)
        return records


def open_rows(config: StreamConfig) -> datasets.IterableDataset:
    """Open the whole data set as a stream.

    Raises:
        ConfigError: if a saved data set has no such split.
        DataError: if it cannot be reached, or has no column `target`.
    """
    import datasets

    with reading_errors(config.path):
        folder = Path(config.path)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            rows = _open_saved(folder, config.split)
        else:
            rows = datasets.load_dataset(
                config.path,
                config.name,
                split=config.split,
                revision=config.revision,
                streaming=True,
            )
        names = rows.column_names
    if names is not None and TARGET not in names:
        raise DataError(
            f"{config.path}: no column {TARGET!r} with the values of a series; columns: "
            f"{', '.join(names)}; build a corpus from it instead"
        )
    return rows


def fingerprint(config: StreamConfig, rows: datasets.IterableDataset) -> str:
    """Identify the data set by what its definition says; its content is not read."""
    identity = [
        config.path,
        config.name,
        config.split,
        config.revision,
        config.train_fraction,
        rows.num_shards,
        None if rows.features is None else str(rows.features),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Turn what `datasets` and the network raise into one line."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: cannot be streamed through `datasets` ({reason}); check stream.path, "
            f"stream.name, stream.split and the network, and log in if it is private"
        ) from error


def _open_saved(folder: Path, split: str) -> datasets.IterableDataset:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.Dataset):
        if split not in saved:
            raise ConfigError(
                f"stream.split: {folder} has no split {split!r}; splits: {', '.join(saved)}"
            )
        saved = saved[split]
    return saved.to_iterable_dataset(num_shards=min(64, max(1, len(saved))))


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
