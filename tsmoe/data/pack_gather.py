"""Cut windows of which some are packs of short series.

Everything is read by slots of a patch, so that a pack is one gather as a window is. A series lies
at the end of its slots, and a pack at the end of its window: what is filled up lies before, as the
model has it.

Shapes: B windows, L points of a window, N patches of its context, M slots of a window, P points of
a slot, U slots of all windows, F pieces of series in all windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from data_pipeline.shards.reader import Corpus
from tsmoe.batch import WindowBatch
from tsmoe.data.gather import WindowGather
from tsmoe.data.packing import SeriesPacks
from tsmoe.data.permutation import Integers, order_key
from tsmoe.data.windows import WindowIndex
from tsmoe.nn.spans import NO_SERIES


@dataclass(frozen=True)
class _Pieces:
    """Series, or a stretch of a long one, in the windows of a batch."""

    rows_F: Integers
    """Window of each; rising."""
    series_F: Integers
    ends_F: Integers
    """One after its last point, in the series."""
    slots_F: Integers
    """Slots that it takes."""
    lengths_F: Integers
    """Points of its tokens, and of the patch after the last: at most those of its slots."""


class PackGather:
    """Cuts windows of which some are packs."""

    def __init__(
        self,
        corpus: Corpus,
        index: WindowIndex,
        *,
        seed: int,
        patch_length: int,
        patch_stride: int,
        is_pinned: bool = False,
    ) -> None:
        """Pack the short series.

        Args:
            corpus: where the series are.
            index: of training windows, without packs.
            seed: decides which of many series that are equally long share a window.
            patch_length: points in a patch of the model; divides those of a window.
            patch_stride: points between the starts of neighbouring patches.
            is_pinned: whether batches are cut into page-locked memory.
        """
        key = order_key(f"packs of {corpus.fingerprint}", seed)
        self.packs = SeriesPacks.of(corpus, index, patch_length=patch_length, key=key)
        self._ends = index.ends
        self._window_length = index.window_length
        self._patch_length, self._patch_stride = patch_length, patch_stride
        self._gather = WindowGather(corpus, patch_length, is_pinned=is_pinned)

    def has_pack(self, series: Integers) -> bool:
        """Say whether one of these windows is a pack."""
        return bool(self.packs.find(series)[1].any())

    def cut(self, series: Integers, starts: Integers) -> WindowBatch:
        """Cut windows of which at least one is a pack, C = 1.

        Args:
            series: of each window; of a pack the one that it stands for.
            starts: first point of each window that is no pack.
        """
        pieces = self._pieces(series, starts)
        num_windows, num_slots = len(series), self._window_length // self._patch_length
        # Pieces lie at the end of their window, one after another.
        ends_F = pieces.slots_F.cumsum()
        last_of_window_B = np.searchsorted(pieces.rows_F, np.arange(1, num_windows + 1)) - 1
        end_slot_F = num_slots - ends_F[last_of_window_B][pieces.rows_F] + ends_F

        piece_of_slot = np.repeat(np.arange(len(ends_F)), pieces.slots_F)
        before_end = ends_F[piece_of_slot] - np.arange(len(piece_of_slot))
        place_U = pieces.rows_F[piece_of_slot] * num_slots + end_slot_F[piece_of_slot] - before_end
        # What no piece lies in is read from the first, and not used.
        piece_U = np.zeros(num_windows * num_slots, np.int64)
        starts_U = np.full_like(piece_U, pieces.ends_F[0] - self._patch_length)
        is_used_U = np.zeros(len(piece_U), bool)
        piece_U[place_U], is_used_U[place_U] = piece_of_slot, True
        starts_U[place_U] = pieces.ends_F[piece_of_slot] - before_end * self._patch_length
        values_UP, observed_UP = self._gather.cut(
            self._gather.place(pieces.series_F[piece_U], starts_U)
        )
        if not is_used_U.all():
            is_fill_U1 = torch.from_numpy(~is_used_U)[:, None]
            values_UP.masked_fill_(is_fill_U1, 0)
            observed_UP = observed_UP & ~is_fill_U1

        # Where in the window the tokens of each slot's piece begin and end; nowhere for fill.
        end_U = np.where(is_used_U, end_slot_F[piece_U] * self._patch_length, 0)
        begin_U = np.where(is_used_U, end_U - pieces.lengths_F[piece_U], self._window_length)
        begin_BM, end_BM = (array.reshape(num_windows, num_slots) for array in (begin_U, end_U))
        series_BM = pieces.series_F[piece_U].reshape(num_windows, num_slots)
        observed_BL = observed_UP.reshape(num_windows, self._window_length)
        place_L = np.arange(self._window_length)
        first_target_BL = (begin_BM + self._patch_length).repeat(self._patch_length, axis=1)
        is_target_BL = observed_BL & torch.from_numpy(place_L >= first_target_BL)
        return WindowBatch(
            values_BCL=values_UP.reshape(num_windows, 1, self._window_length),
            observed_BCL=observed_BL[:, None],
            is_target_BCL=is_target_BL[:, None],
            series_ids_B=torch.from_numpy(series.copy()),
            series_BCN=torch.from_numpy(self._token_series(series_BM, begin_BM, end_BM))[:, None],
        )

    def tokens_alone(self, series: Integers, starts: Integers) -> torch.Tensor:
        """Return series_BCN of windows of one series: what is filled up before it is no token.

        As a series in a pack has no fill before it, a model that learned from packs has not seen
        any, nor is it shown any when it forecasts a short series.
        """
        last_start = self._window_length - 2 * self._patch_length
        start_N = np.arange(0, last_start + 1, self._patch_stride)
        is_token_BN = start_N > -starts[:, None] - self._patch_stride
        is_token_BN[:, -1] = True
        return torch.from_numpy(np.where(is_token_BN, series[:, None], NO_SERIES))[:, None]

    def _token_series(self, series_BM: Integers, begin_BM: Integers, end_BM: Integers) -> Integers:
        """Return the series of each token of the context.

        A token is one of a series if its own patch and the one that it predicts lie in it.
        """
        last_start = self._window_length - 2 * self._patch_length
        start_N = np.arange(0, last_start + 1, self._patch_stride)
        slot_N = start_N // self._patch_length
        is_token_BN = start_N >= begin_BM[:, slot_N]
        is_token_BN &= start_N + 2 * self._patch_length <= end_BM[:, slot_N]
        return np.where(is_token_BN, series_BM[:, slot_N], NO_SERIES)

    def _pieces(self, series: Integers, starts: Integers) -> _Pieces:
        packs, is_pack = self.packs.find(series)
        first = self.packs.first_member[packs]
        counts = np.where(is_pack, self.packs.first_member[packs + 1] - first, 1)
        rows_F = np.arange(len(series)).repeat(counts)
        within_F = np.arange(len(rows_F)) - (counts.cumsum() - counts)[rows_F]
        is_whole_F = ~is_pack[rows_F]
        series_F = np.where(
            is_whole_F, series[rows_F], self.packs.members[(first[rows_F] + within_F) * ~is_whole_F]
        )
        ends_F = np.where(is_whole_F, starts[rows_F] + self._window_length, self._ends[series_F])
        points_F = np.where(is_whole_F, self._window_length, self._ends[series_F])
        # The model cuts patches from the end of a series on, the first one filled up.
        twice = 2 * self._patch_length
        strides_F = -(np.minimum(twice - points_F, 0) // self._patch_stride)
        return _Pieces(
            rows_F=rows_F,
            series_F=series_F,
            ends_F=ends_F,
            slots_F=-(-points_F // self._patch_length),
            lengths_F=strides_F * self._patch_stride + twice,
        )
