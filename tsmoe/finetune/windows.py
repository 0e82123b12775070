"""Training windows of a table, as a function of seed and step.

A window is what a forecast sees, and what follows. Where a model forecasts several patches in one
pass, the last of its context are a gap, as in a forecast. Variates known in the future run one
patch ahead: a token of theirs shows what the tokens beside it are to predict, which the causal mask
allows.

Shapes: B windows, C variates, L points of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from tsmoe.batch import WindowBatch
from tsmoe.errors import DataError
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.order import (
    Integers,
    ShuffledOrder,
    micro_batch_positions,
    uniformly_spaced,
)
from tsmoe.finetune.table import SplitTable
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Rows of a window around its origin, the first row to forecast."""

    context_length: int
    """Rows that are seen."""
    before: int
    """Points of the window before the origin; those before the context are not observed."""
    after: int
    """Points of the window from the origin on."""
    patch_length: int
    prediction_length: int
    """Points from the origin on that are learned."""
    last_patch: int
    """Patches between the context and the last one that is forecast in one pass."""

    @classmethod
    def of(cls, run: FinetuneRun) -> Geometry:
        """Lay windows out as a forecast of this model lays them out."""
        model, table = run.model, run.config.table
        patches = -(-table.prediction_length // model.patch_length)
        gap = (min(patches, model.lookahead_patches) - 1) * model.patch_length
        before = model.context_length - gap
        return cls(
            context_length=min(context_rows(run), before),
            before=before,
            after=gap + model.patch_length,
            patch_length=model.patch_length,
            prediction_length=min(table.prediction_length, gap + model.patch_length),
            last_patch=gap // model.patch_length,
        )


def context_rows(run: FinetuneRun) -> int:
    """Rows that a forecast is made from."""
    return run.config.table.context_length or run.model.context_length


class TableWindows:
    """Cuts this rank's micro-batches of any step."""

    def __init__(self, run: FinetuneRun, split: SplitTable) -> None:
        """Lay all windows out.

        Raises:
            DataError: if few-shot leaves no window.
        """
        self._run, self._split = run, split
        self.source = split.table.path
        self.geometry = geometry = Geometry.of(run)
        table = run.config.table
        first = context_rows(run)
        count = split.borders.train_end - table.prediction_length - first + 1
        wanted = int(count * table.few_shot)
        if wanted < 1:
            raise DataError(
                f"{split.table.path}: table.few_shot ({table.few_shot}) of {count} training "
                f"windows is none; use at least {1 / count:.2g}"
            )
        self.origins = first + uniformly_spaced(count, wanted)
        self.is_mixed = run.model.num_channel_mixed_layers > 0
        self._choices = self._with_targets()
        if not len(self._choices):
            raise DataError(
                f"{split.table.path}: no target has an observed value in any of {wanted} training "
                "windows; use more of them (table.few_shot), or other table.targets"
            )
        # A frame of NaN, so that windows may reach over both ends of the train part.
        self._padded_LC = np.pad(
            split.scaled_LC[: split.borders.train_end],
            ((geometry.before, geometry.after + geometry.patch_length), (0, 0)),
            constant_values=np.nan,
        )
        self._order = ShuffledOrder(len(self._choices), run.seed)

    @property
    def num_windows(self) -> int:
        """Windows of one pass through the data; without mixing each variate makes its own."""
        return len(self._choices)

    @property
    def num_rows(self) -> int:
        """Targets of a window."""
        return self._split.num_targets if self.is_mixed else 1

    def further(self, prediction_length: int) -> TableWindows:
        """Lay windows out that have more steps to forecast.

        Raises:
            DataError: if the train part is too short for them.
        """
        table = replace(self._run.config.table, prediction_length=prediction_length)
        run = replace(self._run, config=replace(self._run.config, table=table))
        if self._split.borders.train_end < context_rows(run) + prediction_length:
            raise DataError(
                f"{self.source}: the train part has no {context_rows(run)} + {prediction_length} "
                "rows, which the model looks ahead in one pass and linear_shortcut=least_squares "
                "is fitted to; use linear_shortcut=learned"
            )
        return TableWindows(run, self._split)

    def micro_batches(self, step: int, ranks: Ranks) -> list[WindowBatch]:
        """Return this rank's micro-batches of a step."""
        training = self._run.training
        return [
            self._cut(self._choices[self._order.items(positions)], step).to(ranks.device)
            for positions in micro_batch_positions(
                step,
                rank=ranks.rank,
                ranks=ranks.size,
                micro_batch_size=training.micro_batch_size,
                global_batch_size=training.global_batch_size,
            )
        ]

    def whole_batch(self, numbers: Integers) -> WindowBatch:
        """Cut windows by their numbers, which go up with time, on the CPU.

        All that follows the context is a target, also behind the steps to forecast; mixed windows
        have all variates.
        """
        items = self._choices[numbers]
        if self.is_mixed:
            every = np.tile(np.arange(self._split.num_variates), (len(items), 1))
            return self._batch(self.origins[items], every, is_whole=True)
        origins_B, variates_B = np.divmod(items, self._split.num_targets)
        return self._batch(self.origins[origins_B], variates_B[:, None], is_whole=True)

    def _with_targets(self) -> Integers:
        """Return the windows of which something can be learned, by origin and, unmixed, variate."""
        geometry, targets = self.geometry, self._split.num_targets
        is_recorded_LC = np.isfinite(self._split.scaled_LC[:, :targets])
        recorded_LC = np.pad(is_recorded_LC.cumsum(axis=0), ((1, 0), (0, 0)))
        first_O = self.origins
        if self._run.training.loss_on == "all":
            first_O = np.maximum(0, self.origins - geometry.before + geometry.patch_length)
        counts_OC = recorded_LC[self.origins + geometry.prediction_length] - recorded_LC[first_O]
        counts = counts_OC.sum(axis=1) if self.is_mixed else counts_OC.ravel()
        return np.flatnonzero(counts)

    def _cut(self, items: Integers, step: int) -> WindowBatch:
        if not self.is_mixed:
            origins_B, variates_B = np.divmod(items, self._split.num_targets)
            return self._batch(self.origins[origins_B], variates_B[:, None])
        chosen_C = self._chosen_variates(step)
        return self._batch(self.origins[items], np.tile(chosen_C, (len(items), 1)))

    def _chosen_variates(self, step: int) -> Integers:
        """Return the variates of a step's windows: some targets, and all covariates."""
        targets = np.arange(self._split.num_targets)
        most = self._run.training.max_variates
        if most is not None and most < len(targets):
            generator = np.random.default_rng((self._run.seed, step, 1))
            targets = np.sort(generator.choice(targets, most, replace=False))
        covariates = np.arange(self._split.num_targets, self._split.num_variates)
        return np.concatenate((targets, covariates))

    def _batch(
        self, origins_B: Integers, variates_BC: Integers, *, is_whole: bool = False
    ) -> WindowBatch:
        geometry, split = self.geometry, self._split
        place_L = np.arange(-geometry.before, geometry.after)
        is_known_BC = variates_BC >= split.num_variates - split.num_known_future
        ahead_BC = np.where(is_known_BC, geometry.patch_length, 0)
        rows_BCL = (
            origins_B[:, None, None] + ahead_BC[..., None] + place_L + geometry.before
        )  # of the frame
        values_BCL = self._padded_LC[rows_BCL, variates_BC[..., None]]
        is_recorded_BCL = np.isfinite(values_BCL)
        is_covariate_BC = variates_BC >= split.num_targets
        is_seen_L = (place_L >= -geometry.context_length) & (place_L < 0)
        # As in a forecast, nothing is known of what follows the steps to forecast.
        is_before_end_L = place_L + geometry.patch_length < self._run.config.table.prediction_length
        is_known_L = (place_L >= -geometry.context_length) & is_before_end_L
        is_seen_BCL = np.where(is_known_BC[..., None], is_known_L, is_seen_L)
        is_target_L = place_L < geometry.prediction_length
        if self._run.training.loss_on == "horizon":
            is_target_L &= place_L >= 0
        if is_whole:
            is_target_L = place_L >= 0
        is_target_BCL = is_recorded_BCL & is_target_L & ~is_covariate_BC[..., None]
        return WindowBatch(
            values_BCL=torch.from_numpy(np.where(is_recorded_BCL, values_BCL, 0)),
            observed_BCL=torch.from_numpy(is_recorded_BCL & is_seen_BCL),
            is_target_BCL=torch.from_numpy(is_target_BCL),
            series_ids_B=torch.from_numpy(np.ascontiguousarray(variates_BC[:, 0])),
            is_covariate_BC=torch.from_numpy(is_covariate_BC) if self.is_mixed else None,
        )
