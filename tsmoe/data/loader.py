"""Batches of windows for each step and rank, read ahead by torch's DataLoader.

The dataset is one of *batches*: item i is the i-th micro-batch of this rank, so that a batch is one
gather, and a run resumes by starting from another item.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data_pipeline.shards.reader import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.config import Section
from tsmoe.data.mixup import mix_windows
from tsmoe.data.order import make_order, order_key, uniform
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.windows import WindowIndex
from tsmoe.ranks import Ranks

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """How windows are chosen and loaded."""

    window_stride: int = 1
    """Points between the starts of neighbouring windows of a series."""
    source_temperature: float = 0.5
    """A source's share of the windows is its points to this power: 1 keeps proportions, 0 makes
    all sources equal."""
    mixup_share: float = 0.0
    """Share of the windows that are mixed with a window of another place in the order."""
    verifies_corpus: bool = True
    """Whether the hashes of all shards are checked before training: about a second per gigabyte."""
    num_workers: int = 0
    """Processes that cut batches ahead of time; 0 cuts them in the training process."""
    max_validation_windows: int = 512
    """Windows of the validation split that are looked at, evenly spaced over all of them."""

    def __post_init__(self) -> None:
        if self.window_stride < 1 or self.max_validation_windows < 1 or self.num_workers < 0:
            raise ValueError(
                f"window_stride ({self.window_stride}) and max_validation_windows "
                f"({self.max_validation_windows}) must be at least 1, num_workers "
                f"({self.num_workers}) at least 0"
            )
        if not (0 <= self.source_temperature <= 1 and 0 <= self.mixup_share <= 1):
            raise ValueError(
                f"source_temperature ({self.source_temperature}) and mixup_share "
                f"({self.mixup_share}) must lie between 0 and 1"
            )


def cut_batch(
    corpus: Corpus, index: WindowIndex, sources: Integers, numbers: Integers
) -> WindowBatch:
    """Cut windows out of the corpus: one gather and its masks, C = 1."""
    rows, series, starts = index.locate(sources, numbers)
    values_BL = torch.from_numpy(corpus.gather(series, starts, index.window_length))
    observed_BL = ~values_BL.isnan()
    is_target_BL = observed_BL
    if index.is_validation:
        position_BL = torch.from_numpy(starts)[:, None] + torch.arange(index.window_length)
        is_target_BL = observed_BL & (position_BL >= torch.from_numpy(index.begins[rows])[:, None])
    return WindowBatch(
        values_BCL=values_BL.masked_fill_(~observed_BL, 0)[:, None],
        observed_BCL=observed_BL[:, None],
        is_target_BCL=is_target_BL[:, None],
        series_ids_B=torch.from_numpy(series),
    )


class TrainingBatches(Dataset[WindowBatch]):
    """Item i is this rank's i-th micro-batch after `first_window`; endless in principle.

    Micro-batch m of a step takes windows m*M*W + r*M onwards of the step, for rank r of W and M
    windows a micro-batch, so that a step holds the same windows for any number of ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        index: WindowIndex,
        *,
        seed: int,
        temperature: float,
        mixup_share: float = 0.0,
        patch_mask: PatchMask | None = None,
        micro_batch_size: int,
        ranks: Ranks,
        first_window: int = 0,
    ) -> None:
        self.corpus = corpus
        self.index = index
        self.first_window = first_window
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = ranks.rank, ranks.size
        self.mixup_share = mixup_share
        self.patch_mask = patch_mask
        self.order, self.partner_order = (
            make_order(index.counts, index.points, temperature=temperature, key=key)
            for key in (
                order_key(corpus.fingerprint, seed),
                order_key(f"partners of {corpus.fingerprint}", seed),
            )
        )

    def __getitem__(self, item: int) -> WindowBatch:
        first = self.first_window + (item * self.world_size + self.rank) * self.micro_batch_size
        positions = first + np.arange(self.micro_batch_size, dtype=np.int64)
        batch = cut_batch(self.corpus, self.index, *self.order.draw(positions))
        if self.mixup_share > 0:
            batch = self._mix(batch, positions)
        if self.patch_mask is not None:
            seen_BCL = self.patch_mask.hide(batch.observed_BCL, positions, self.order.key)
            batch = replace(batch, observed_BCL=seen_BCL)
        return batch

    def _mix(self, batch: WindowBatch, positions: Integers) -> WindowBatch:
        partners = cut_batch(self.corpus, self.index, *self.partner_order.draw(positions))
        # Up to half of a window is its partner, either way up; which windows, and how much, is a
        # function of the position, as all else.
        chance, amount = uniform(positions, self.partner_order.key)
        shares = np.where(chance < self.mixup_share, amount - 0.5, 0)
        return mix_windows(batch, partners, torch.from_numpy(shares.astype(np.float32)))


class ValidationBatches(Dataset[WindowBatch]):
    """A fixed, evenly spaced part of the validation windows, dealt to the ranks.

    Every rank has the same number of batches, as all must take part in each forward pass; where a
    rank has no window left it repeats the last one with no point that counts.
    """

    def __init__(
        self, corpus: Corpus, index: WindowIndex, *, max_windows: int, batch_size: int, ranks: Ranks
    ) -> None:
        if not index.is_validation:
            raise ValueError("validation batches want the windows of the validation split")
        self.corpus, self.index, self.batch_size = corpus, index, batch_size
        total = index.num_windows
        count = min(total, max_windows)
        self.windows = np.arange(count, dtype=np.int64) * total // count
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
        batch = cut_batch(self.corpus, self.index, sources, numbers)
        is_spare_B = torch.from_numpy(places >= len(self.windows))
        batch.is_target_BCL[is_spare_B] = False
        return batch


def load_training(
    batches: TrainingBatches, *, num_batches: int, num_workers: int, device: torch.device
) -> Iterator[WindowBatch]:
    """Iterate over the next micro-batches, cut ahead of time by `num_workers` processes."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=range(num_batches),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    return iter(loader)
