"""Filling what is missing of the windows of a table.

Shapes: B windows, C variates, L steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.table import Table
from tsmoe.batch import WindowBatch
from tsmoe.errors import ConfigError, DataError
from tsmoe.heads.task import ReconstructionHeadConfig
from tsmoe.nn.lines import fill_by_lines
from tsmoe.tasks.config import ImputationTaskConfig, MaskConfig
from tsmoe.tasks.forecast import open_scaled
from tsmoe.tasks.predictor import TaskPredictor
from tsmoe.tasks.task import MODEL, TaskEvaluation
from tsmoe.tasks.windows import Floats, Integers, WindowStore, generator_of, points_batch

Mask = NDArray[np.bool_]

# What random numbers are drawn for.
_TRAINING, _VALIDATION, _TEST = 1, 2, 3
# Test windows that are filled together.
_BLOCK = 256


class ImputationTask:
    """Windows of a table, of which a part is hidden.

    Source: TSLib's protocol: windows of 96, independent points, errors on what was hidden, scaled
    by the train part. Departures: one model for all shares; blocks besides points.
    """

    def __init__(
        self,
        name: str,
        config: ImputationTaskConfig,
        path: str,
        *,
        context_length: int,
        seed: int = 0,
        table: Table | None = None,
    ) -> None:
        """Open the table, unless it is given.

        Raises:
            ConfigError: if a column is named that is not there.
            DataError: if there are too few rows, or nothing is observed of a variate.
        """
        self.name, self.config, self.source, self.seed = name, config, path, seed
        self.context_length = context_length
        self.loss_of_points = config.loss
        self.table, borders, self.scaler, scaled_LC = open_scaled(
            config, path, context_length=context_length, prediction_length=1, table=table
        )
        mask, most = config.mask, context_length * scaled_LC.shape[1]
        if min(mask.shares) * most < 1 or mask.block_length > context_length:
            raise ConfigError(
                f"tasks.{name}.mask: shares {list(mask.shares)} must hide a point of the "
                f"{most} of a window, and block_length ({mask.block_length}) must be at most "
                f"model.context_length ({context_length})"
            )
        self._store = WindowStore([scaled_LC], lead=0)
        parts = {
            "train": (0, borders.train_end),
            # They reach back over their border, as in TSLib; every window ends in its part.
            "validation": (borders.train_end - context_length + 1, borders.validation_end),
            "test": (borders.validation_end - context_length + 1, borders.test_end),
        }
        self._starts = {part: self._windows(part, *rows) for part, rows in parts.items()}
        self.num_train = len(self._starts["train"])
        self.num_validation = len(self._starts["validation"])
        self.fingerprint = self._store.fingerprint

    def head(self) -> ReconstructionHeadConfig:
        """Return the head that gives the points of each patch."""
        return ReconstructionHeadConfig()

    def training_batch(self, items: Integers, positions: Integers) -> WindowBatch:
        """Cut training windows; what is hidden is drawn anew for each position in the run."""
        return self._batch("train", items, [(_TRAINING, int(position)) for position in positions])

    def validation_batch(self, places: Integers) -> WindowBatch:
        """Cut validation windows; the same points are hidden each time."""
        return self._batch("validation", places, [(_VALIDATION, int(place)) for place in places])

    def series_name(self, number: int) -> str:  # noqa: ARG002
        """Name the table."""
        return self.source

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Say what is filled."""
        return {
            "type": "imputation",
            "variates": list(self.table.variates),
            "mean": self.scaler.mean_C.tolist(),
            "std": self.scaler.std_C.tolist(),
            "time_column": self.table.time_column,
        }

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Fill every window of the test part, with each share and kind of mask.

        Baselines: linear interpolation, and the mean of what is shown of the window.
        """
        mask = self.config.mask
        results = []
        for kind in mask.kinds:
            for share in mask.shares:
                for model, (mse, mae) in self._errors(predictor, kind, share).items():
                    results.append(
                        {
                            "model": model,
                            "mask": kind,
                            "share": share,
                            "masked_mse": mse,
                            "masked_mae": mae,
                        }
                    )
        return TaskEvaluation(
            task="imputation",
            data=self.source,
            facts={"context": self.context_length, "windows": len(self._starts["test"])},
            results=results,
        )

    def _errors(
        self, predictor: TaskPredictor, kind: str, share: float
    ) -> dict[str, tuple[float, float]]:
        """Return mean squared and absolute errors on what is hidden, by model."""
        sums = {model: np.zeros(2) for model in (MODEL, "linear_interpolation", "window_mean")}
        starts_M, count = self._starts["test"], 0
        for first in range(0, len(starts_M), _BLOCK):
            places = np.arange(first, min(first + _BLOCK, len(starts_M)))
            values_BCL = self._store.cut(starts_M[places], self.context_length)
            hidden_BCL = np.stack(
                [
                    draw_mask(
                        values_BCL.shape[1:], kind, share, self.config.mask.block_length,
                        # The same for every run, so that runs are compared on the same points.
                        generator_of(0, _TEST, place),
                    )
                    for place in places.tolist()
                ]
            )  # fmt: skip
            is_scored_BCL = hidden_BCL & np.isfinite(values_BCL)
            count += int(is_scored_BCL.sum())
            filled = {
                MODEL: predictor.predict(values_BCL, self.name, shown_BCL=~hidden_BCL),
                **fill_simply(np.where(hidden_BCL, np.nan, values_BCL)),
            }
            for model, filled_BCL in filled.items():
                error = (filled_BCL - values_BCL)[is_scored_BCL].astype(np.float64)
                sums[model] += (np.square(error).sum(), np.abs(error).sum())
        if not count:
            raise DataError(
                f"{self.source}: share {share} of {kind} hides no recorded value of the test part; "
                "hide more (mask.shares) or give a table with fewer gaps"
            )
        return {model: (float(s[0] / count), float(s[1] / count)) for model, s in sums.items()}

    def _windows(self, part: str, first: int, end: int) -> Integers:
        starts_M = self._store.starts(0, first, end - self.context_length)
        recorded_M = self._store.count_recorded(starts_M, 0, self.context_length)
        starts_M = starts_M[recorded_M > 0]
        if not len(starts_M):
            raise DataError(
                f"{self.source}: the {part} part (rows {first} to {end}) has no window of "
                f"{self.context_length} rows with a recorded value; change tasks.{self.name}.split "
                "or shorten model.context_length"
            )
        return starts_M

    def _batch(self, part: str, items: Integers, places: list[tuple[int, int]]) -> WindowBatch:
        values_BCL = self._store.cut(self._starts[part][items], self.context_length)
        hidden_BCL = np.stack(
            [
                draw_training_mask(
                    values_BCL.shape[1:], self.config.mask, generator_of(self.seed, *place)
                )
                for place in places
            ]
        )
        return points_batch(
            values_BCL,
            shown_BCW=~hidden_BCL,
            target_BCW=hidden_BCL,
            ids_B=np.zeros(len(items), np.int64),
            task=self.name,
        )


def fill_rows(predictor: TaskPredictor, task: str, scaled_LC: Floats) -> Floats:
    """Return what the model makes of all points of a table, those without a value among them.

    Windows overlap by half, and a point is taken from the one whose middle is nearest, so that gaps
    are seen from both sides. What is missing of a short table counts as not observed.

    Args:
        predictor: of the model.
        task: name of it.
        scaled_LC: as in training; NaN where not observed.
    """
    context, length = predictor.context_length, len(scaled_LC)
    step = max(1, context // 2)
    count = 1 + max(0, -(-(length - context) // step))
    # The first window may begin before the table.
    lead = (count - 1) * step + context - length
    padded_LC = np.pad(scaled_LC, ((lead, 0), (0, 0)), constant_values=np.nan)
    windows_BCL = np.lib.stride_tricks.sliding_window_view(padded_LC, context, axis=0)[::step]
    points_BCL = predictor.predict(np.ascontiguousarray(windows_BCL), task)
    row_L = np.arange(len(padded_LC))
    # The window that has a row nearest to its middle.
    window_L = np.clip(np.rint((row_L - (context - 1) / 2) / step), 0, count - 1).astype(np.int64)
    return points_BCL[window_L, :, row_L - window_L * step][lead:]


def draw_training_mask(
    shape: tuple[int, ...], config: MaskConfig, generator: np.random.Generator
) -> Mask:
    """Hide points of one window, by one of the kinds and shares."""
    kind = config.kinds[generator.integers(len(config.kinds))]
    share = config.shares[generator.integers(len(config.shares))]
    return draw_mask(shape, kind, share, config.block_length, generator)


def draw_mask(
    shape: tuple[int, ...],
    kind: str,
    share: float,
    block_length: int,
    generator: np.random.Generator,
) -> Mask:
    """Return hidden_CL of one window.

    Points are independent. Blocks of `block_length` begin independently, so often that each point
    is in one with the chance `share`; they may overlap.
    """
    if kind == "points":
        return generator.random(shape) < share
    variates, length = shape
    # Of the blocks that could cover a point none may begin: (1 - p)^block_length = 1 - share.
    chance = 1 - (1 - share) ** (1 / block_length)
    begins = generator.random((variates, length + block_length - 1)) < chance
    covered = np.concatenate((np.zeros((variates, 1)), begins.cumsum(axis=1)), axis=1)
    return (covered[:, block_length:] - covered[:, :length]) > 0


def fill_simply(values_BCL: Floats) -> dict[str, Floats]:
    """Fill NaN by linear interpolation between neighbours in time, and by the mean of a variate.

    Before the first and after the last recorded value interpolation repeats it. A variate of which
    nothing is shown is filled with 0, the mean of the train part.
    """
    is_shown_BCL = np.isfinite(values_BCL)
    count_BC1 = is_shown_BCL.sum(axis=-1, keepdims=True)
    sum_BC1 = np.where(is_shown_BCL, values_BCL, 0).sum(axis=-1, keepdims=True)
    mean_BCL = np.broadcast_to(sum_BC1 / np.maximum(count_BC1, 1), values_BCL.shape)
    linear_BCL = fill_by_lines(
        torch.from_numpy(np.nan_to_num(values_BCL)), torch.from_numpy(is_shown_BCL)
    ).numpy()
    filled = {"linear_interpolation": linear_BCL, "window_mean": mean_BCL}
    return {
        model: np.where(is_shown_BCL, values_BCL, filled_BCL).astype(np.float32)
        for model, filled_BCL in filled.items()
    }
