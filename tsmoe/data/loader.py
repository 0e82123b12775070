"""Batches of windows for each step and rank, for training and for validation.

Item i is the i-th micro-batch of this rank, so that a batch is one gather, and a run resumes by
starting from another item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from data_pipeline.shards.reader import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.gather import PlacedWindows, WindowGather
from tsmoe.data.mixing import CurriculumPhase, Mixture, check_curriculum, source_quotas
from tsmoe.data.mixup import mix_windows
from tsmoe.data.order import WindowOrder
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.permutation import Integers, order_key, uniform
from tsmoe.data.plan import WindowPlan
from tsmoe.data.read_ahead import ReadAhead
from tsmoe.data.shard_blocks import ShardBlocks
from tsmoe.data.windows import WindowIndex
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class DataConfig(Mixture):
    """How windows are chosen and loaded."""

    curriculum: tuple[CurriculumPhase, ...] = ()
    """Other shares of the sources from certain steps on."""
    window_stride: int = 1
    """Points between the starts of neighbouring windows of a series."""
    mixup_share: float = 0.0
    """Share of the windows that are mixed with a window of another place in the order."""
    packs_short_series: bool = False
    """Whether series shorter than a window share windows, several in each; none sees another. A
    source's share of the windows stays, so that it comes round to its short series more often."""
    resident_shards: int = 0
    """Shards of each source that windows are drawn from at a time, so that a bounded cache of a
    remote corpus suffices; mix-up draws from as many others. 0 draws from all shards."""
    verifies_corpus: bool = True
    """Whether shards are checked against their hashes before training, about a second per gigabyte.
    A shard that was whole once is not read again while its file is the same."""
    on_bad_shard: Literal["stop", "quarantine"] = "stop"
    """What follows a shard that is missing or damaged: `stop`, or `quarantine`: the run goes on as
    if nothing in it had been observed, and lists it in quarantine.json of the run folder."""
    num_workers: int = 0
    """Threads that cut batches ahead of time; 0 cuts them when they are asked for."""
    max_validation_windows: int = 512
    """Windows of the validation split that are looked at, evenly spaced over all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_curriculum(self.curriculum)
        if self.window_stride < 1 or self.max_validation_windows < 1:
            raise ValueError(
                f"window_stride ({self.window_stride}) and max_validation_windows "
                f"({self.max_validation_windows}) must be at least 1"
            )
        if self.num_workers < 0 or self.resident_shards < 0:
            raise ValueError(
                f"num_workers ({self.num_workers}) and resident_shards ({self.resident_shards}) "
                "must be at least 0"
            )
        if not 0 <= self.mixup_share <= 1:
            raise ValueError(f"mixup_share ({self.mixup_share}) must lie between 0 and 1")
        if self.mixup_share and self.packs_short_series:
            raise ValueError(
                f"mixup_share ({self.mixup_share}) must be 0 where packs_short_series is true: "
                "windows of several series cannot be mixed"
            )


class TrainingBatches:
    """Item i is this rank's i-th micro-batch after `first_window`; endless in principle.

    May be used by several threads.
    """

    def __init__(
        self,
        corpus: Corpus,
        index: WindowIndex,
        config: DataConfig,
        *,
        seed: int,
        patch_mask: PatchMask | None = None,
        packs: PackGather | None = None,
        global_batch_size: int,
        micro_batch_size: int,
        ranks: Ranks,
        first_window: int = 0,
    ) -> None:
        if packs is not None:
            index = packs.packs.index
        self.corpus, self.index = corpus, index
        self.mixup_share = config.mixup_share
        self.patch_mask = patch_mask
        self._packs = packs
        self._gather = WindowGather(
            corpus, index.window_length, is_pinned=ranks.device.type == "cuda"
        )
        quotas = [(0, source_quotas(config, corpus, index))]
        for phase in config.curriculum:
            section = f"data.curriculum (from_step {phase.from_step})"
            of_phase = source_quotas(phase.over(config), corpus, index, section=section)
            quotas.append((phase.from_step * global_batch_size, of_phase))
        blocks = shard_blocks(corpus, index, config.resident_shards)
        self._plan, self._partners = (
            WindowPlan(
                self._gather,
                index,
                WindowOrder(index.counts, quotas, order_key(name, seed), blocks=blocks),
                micro_batch_size=micro_batch_size,
                ranks=ranks,
                first_window=first_window,
            )
            for name in (corpus.fingerprint, f"partners of {corpus.fingerprint}")
        )

    @property
    def order(self) -> WindowOrder:
        """The order of all windows of the run, over all ranks."""
        return self._plan.order

    def source_shares(self, begin: int, end: int) -> dict[str, float]:
        """Return the part of each source in the windows [begin, end) of the run, of all ranks."""
        dealt = self.order.dealt(end) - self.order.dealt(begin)
        names = self.corpus.sources
        return {names[i]: int(dealt[i]) / (end - begin) for i in np.flatnonzero(self.index.counts)}

    def cache_problem(self) -> str | None:
        """Say so if the cache of a remote corpus is too small for what is drawn from at a time."""
        room = self.corpus.max_resident_shards
        if room is None:
            return None
        if self.order.blocks is None:
            drawn_from = len(np.unique(self.corpus.series_shards[self.index.series]))
            hint = "set data.resident_shards or raise"
        else:
            # Those of now and of soon; of partners in mix-up, as many others.
            drawn_from = 2 * self.order.blocks.num_resident * (1 + (self.mixup_share > 0))
            hint = "lower data.resident_shards or raise"
        if drawn_from <= room:
            return None
        return (
            f"windows are drawn from {drawn_from} shards at a time, but the cache holds {room}: "
            f"shards will be fetched again and again; {hint} TSMOE_CACHE_BYTES"
        )

    def __getitem__(self, item: int) -> WindowBatch:
        positions, windows = self._plan[item]
        batch = self._cut(windows)
        if self.mixup_share > 0:
            batch = self._mix(batch, item)
        if self.patch_mask is not None:
            seen_BCL = self.patch_mask.hide(
                batch.observed_BCL, positions, self.order.key, batch.series_BCN
            )
            batch = replace(batch, observed_BCL=seen_BCL)
        return batch

    def prepare(self, item: int) -> None:
        """Get ready, between items, for what comes long after an item."""
        self._plan.prepare(item)
        if self.mixup_share > 0:
            self._partners.prepare(item)

    def _cut(self, windows: PlacedWindows) -> WindowBatch:
        """Cut windows out of the corpus, C = 1."""
        if self._packs is not None and self._packs.has_pack(windows.series):
            return self._packs.cut(windows.series, windows.starts)
        values_BL, observed_BL = self._gather.cut(windows)
        return WindowBatch(
            values_BCL=values_BL[:, None],
            observed_BCL=observed_BL[:, None],
            is_target_BCL=observed_BL[:, None],
            series_ids_B=torch.from_numpy(windows.series.copy()),
        )

    def _mix(self, batch: WindowBatch, item: int) -> WindowBatch:
        positions, partners = self._partners[item]
        # Up to half of a window is its partner, either way up; which windows, and how much, is a
        # function of the position, as all else.
        chance, amount = uniform(positions, self._partners.order.key)
        shares = np.where(chance < self.mixup_share, amount - 0.5, 0)
        share_B = torch.from_numpy(shares.astype(np.float32))
        return mix_windows(batch, self._cut(partners), share_B)


class ValidationBatches:
    """A fixed, evenly spaced part of the validation windows, dealt to the ranks.

    Every rank has the same number of batches, as all must take part in each forward pass; where a
    rank has no window left it repeats the last one with no point that counts.
    """

    def __init__(
        self,
        corpus: Corpus,
        index: WindowIndex,
        *,
        max_windows: int,
        batch_size: int,
        ranks: Ranks,
        resident_shards: int = 0,
        packs: PackGather | None = None,
    ) -> None:
        """Choose the windows; with `resident_shards`, from so many shards of each source.

        Where training has `packs`, a short series is seen here too without the fill before it.
        """
        if not index.is_validation:
            raise ValueError("validation batches want the windows of the validation split")
        self.index, self.batch_size = index, batch_size
        self._packs = packs
        self._gather = WindowGather(corpus, index.window_length)
        counts = np.diff(index.first_window, append=index.num_windows)
        if (blocks := shard_blocks(corpus, index, resident_shards)) is not None:
            counts[~blocks.is_in_spread()] = 0
        ends = counts.cumsum()
        count = min(int(ends[-1]), max_windows)
        chosen = np.arange(count, dtype=np.int64) * ends[-1] // max(count, 1)
        rows = np.searchsorted(ends, chosen, side="right")
        self.windows = index.first_window[rows] + chosen - (ends - counts)[rows]
        self.rank, self.world_size = ranks.rank, ranks.size

    def __len__(self) -> int:
        return math.ceil(len(self.windows) / (self.batch_size * self.world_size))

    def __getitem__(self, item: int) -> WindowBatch:
        if not 0 <= item < len(self):
            raise IndexError(item)
        first = (item * self.world_size + self.rank) * self.batch_size
        places = first + np.arange(self.batch_size)
        windows = self.windows[np.minimum(places, len(self.windows) - 1)]
        ends = self.index.counts.cumsum()
        sources = np.searchsorted(ends, windows, side="right").astype(np.int64)
        numbers = windows - (ends - self.index.counts)[sources]
        _, series, starts = self.index.locate(sources, numbers)
        values_BL, observed_BL = self._gather.cut(self._gather.place(series, starts))
        # What lies before the split is context; a window past the last one counts for nothing.
        is_spare_B = places >= len(self.windows)
        first_target_B = np.where(
            is_spare_B, self.index.window_length, self._begins(series, starts)
        )
        place_L = torch.arange(self.index.window_length)
        is_target_BL = observed_BL & (place_L >= torch.from_numpy(first_target_B)[:, None])
        return WindowBatch(
            values_BCL=values_BL[:, None],
            observed_BCL=observed_BL[:, None],
            is_target_BCL=is_target_BL[:, None],
            series_ids_B=torch.from_numpy(series),
            series_BCN=None if self._packs is None else self._packs.tokens_alone(series, starts),
        )

    def _begins(self, series: Integers, starts: Integers) -> Integers:
        assert self.index.begins is not None
        return self.index.begins[series] - starts


def shard_blocks(corpus: Corpus, index: WindowIndex, resident_shards: int) -> ShardBlocks | None:
    """Return the blocks of shards that an order keeps to; None for all shards at once."""
    if resident_shards == 0:
        return None
    return ShardBlocks(
        corpus.source_ids[index.series],
        corpus.series_shards[index.series],
        np.diff(index.first_window, append=index.num_windows),
        resident_shards,
    )


def load_training(
    batches: TrainingBatches,
    *,
    num_batches: int,
    num_workers: int,
    timeout_seconds: float,
    first_batch: int = 0,
) -> ReadAhead[WindowBatch]:
    """Iterate over micro-batches from one on, cut ahead of time by `num_workers` threads.

    Raises:
        DataError: if a batch is not there in time, or a shard cannot be read.
    """
    return ReadAhead(
        lambda item: batches[first_batch + item],
        num_items=num_batches,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        what=str(batches.corpus.path),
        prepare=lambda item: batches.prepare(first_batch + item),
    )
