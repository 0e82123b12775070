"""Forecasts of validation windows while training, shared out over ranks.

Every rank passes as many windows as any other: where experts are spread over ranks, or weights
gathered layer by layer, all must enter the model equally often.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tsmoe.errors import DataError
from tsmoe.evaluate.protocol import WindowBlock, iterate_windows
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.order import share_of_rank, uniformly_spaced
from tsmoe.finetune.table import SplitTable
from tsmoe.finetune.windows import context_rows
from tsmoe.inference import Forecaster
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import Ranks
from tsmoe.train.held_out import HeldOutForecasts

# Windows of one pass through the model.
_BLOCK = 64


@dataclass(frozen=True)
class Validation:
    """Windows of the validation part."""

    run: FinetuneRun
    split: SplitTable
    ranks: Ranks

    def error(self, model: TimeTracker, show: HeldOutForecasts | None = None) -> float:
        """Return the mean squared error of the forecasts, scaled by the train part. Collective.

        Args:
            model: of this rank.
            show: takes some of this rank's forecasts out.
        """
        split, ranks = self.split, self.ranks
        was_training = model.training
        forecaster = Forecaster(model, {}, ranks.device)
        # A start treats each variate by itself and has no use for covariates.
        num_known = split.num_known_future if forecaster.mixes_variates else 0
        places_B, is_own_B = self._share()
        sums = torch.zeros(2, dtype=torch.float64)
        for block in self._windows(places_B):
            with exact_onednn_matmul(ranks.device):
                forecast = forecaster.forecast_batch(
                    block.context_BCL,
                    self.run.config.table.prediction_length,
                    num_covariates=split.num_covariates,
                    future_BFQ=block.target_BCQ[:, split.num_variates - num_known :],
                )
            target_BCQ = block.target_BCQ[:, : split.num_targets]
            if show is not None:
                quantiles_BCQK = forecast.quantiles_BCQK
                show.add(
                    block.context_BCL[:, : split.num_targets],
                    target_BCQ,
                    forecast.mean_BCQ[..., None] if quantiles_BCQK is None else quantiles_BCQK,
                    levels=forecaster.quantile_levels,
                )
            counts_BCQ = np.isfinite(target_BCQ)
            counts_BCQ &= is_own_B[block.first :][: len(target_BCQ), None, None]
            error = (forecast.mean_BCQ - target_BCQ)[counts_BCQ].astype(np.float64)
            sums += torch.tensor([np.square(error).sum(), counts_BCQ.sum()], dtype=torch.float64)
        model.train(was_training)
        total, count = ranks.sum(sums.to(ranks.device)).tolist()
        if not count:
            raise DataError(
                f"{split.table.path}: no target has an observed value in the validation windows; "
                "use more of them (stopping.max_windows) or another table.split"
            )
        return total / count

    def _share(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return this rank's windows, and which count: some may be there for company only."""
        borders, config = self.split.borders, self.run.config
        count = borders.validation_end - borders.train_end - config.table.prediction_length + 1
        places = uniformly_spaced(count, config.stopping.max_windows)
        return share_of_rank(places, rank=self.ranks.rank, ranks=self.ranks.size)

    def _windows(self, places_B: NDArray[np.int64]) -> Iterator[WindowBlock]:
        return iterate_windows(
            self.split.scaled_LC,
            first_target=self.split.borders.train_end,
            end=self.split.borders.validation_end,
            context_length=context_rows(self.run),
            prediction_length=self.run.config.table.prediction_length,
            block_size=_BLOCK,
            places_B=places_B,
        )
