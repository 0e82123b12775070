"""Fine-tune Time Tracker on a table: what the course of such a run asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.config import encode
from tsmoe.finetune.config import FinetuneConfig, FinetuneRun, FinetuneTrainingConfig
from tsmoe.finetune.course import Course
from tsmoe.finetune.fitted_shortcut import FittedShortcut, fit_shortcut
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.memory import check_memory
from tsmoe.finetune.result import RunResult, hand_over
from tsmoe.finetune.start import Start, open_start, resolve_run
from tsmoe.finetune.table import SplitTable, open_table
from tsmoe.finetune.trainable import prepare_finetuning
from tsmoe.finetune.validation import Validation
from tsmoe.finetune.windows import TableWindows
from tsmoe.models import build_model
from tsmoe.models.older import complete_model
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.loop import Outcome
from tsmoe.train.objective import NextPatchObjective, Objective
from tsmoe.train.run_lock import run_lock

logger = logging.getLogger(__name__)

# What of the section `training` says how a step learns; the rest is cadence, and how many steps.
_LEARNED_BY = ("loss_on", "error_unit", "target_clip", "global_batch_size", "max_variates")


def finetune(config: FinetuneConfig) -> tuple[Outcome, RunResult | None]:
    """Fine-tune, or go on with a run that was interrupted. Every rank of the launcher calls it.

    Leaves in the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, package/,
    result.json, graph.csv and graph.png where variates are mixed, and a marker.

    Returns:
        How it ended, and on the first rank what came of it, once it is done.

    Raises:
        ConfigError: if the settings do not fit one another, the start or the number of ranks.
        DataError: if the table is too short or nothing is observed.
        CheckpointError: if the start or the run folder's checkpoints can't be used.
    """
    start = None if config.start is None else open_start(config.start)
    run = resolve_run(config, start)
    run.check_world_size(ranks_module.launched_world_size())
    ranks = ranks_module.start(
        timeout_seconds=config.training.timeout_seconds, device=config.training.device
    )
    ranks = replace(ranks, meter=CommunicationMeter())
    context_length = config.table.context_length or run.model.context_length
    if ranks.is_first:
        _warn_of_unseen(run, start, context_length)
    split = open_table(config.table, context_length=context_length)
    check_memory(run, split, ranks)
    with run_lock(Path(run.run), ranks):
        return Course(run, TableWork(run, start, split, ranks), ranks).go()


def _warn_of_unseen(run: FinetuneRun, start: Start | None, context_length: int) -> None:
    """Say what settings leave out that one may think is there."""
    if context_length > run.model.context_length:
        logger.warning(
            "the model looks back %d rows; of the %d of table.context_length only the linear "
            "baseline uses more",
            run.model.context_length, context_length,
        )  # fmt: skip
    mixed = 0 if start is None else start.model.num_channel_mixed_layers
    wanted = run.config.mixing.num_channel_mixed_layers
    if wanted < mixed:
        logger.warning(
            "in the start %d layers mix variates, in this run %d; add "
            "mixing.num_channel_mixed_layers=%d to go on with what they learned of one another",
            mixed, wanted, mixed,
        )  # fmt: skip


class TableWork:
    """A table, and what a model of next patches learns from it."""

    doing = "fine-tuning"
    error_name = "MSE"

    def __init__(
        self, run: FinetuneRun, start: Start | None, split: SplitTable, ranks: Ranks
    ) -> None:
        self.run, self.start, self.split, self.ranks = run, start, split, ranks
        self.windows = TableWindows(run, split)
        self.validation = Validation(run, split, ranks)
        self.source = split.table.path
        self.fingerprint = split.fingerprint
        self.num_windows = self.windows.num_windows
        self.fits_shortcut = run.config.linear_shortcut == "least_squares"
        self.learns_all = run.config.trainable.learns_all and not self.fits_shortcut

    def prepare(self, model: TimeTracker, *, begins: bool) -> None:
        """Load the start into the model, fit its shortcut, then say what learns. Collective."""
        prepare(model, run=self.run, start=self.start)
        if self.fits_shortcut and begins:
            fitted = self.ranks.on_first(self._fitted_shortcut)
            assert model.shortcut is not None, "asked for"
            model.shortcut.project.weight.data.copy_(fitted.weight)
            for parameter in model.head.parameters():
                parameter.data.mul_(fitted.share)

    def _fitted_shortcut(self) -> FittedShortcut:
        """Fit it to what the whole model leaves over, which this rank may hold a part of."""
        whole = build_model(self.run.model, seed=self.run.seed)
        prepare_start(whole, run=self.run, start=self.start)
        config = self.run.config
        return fit_shortcut(
            whole,
            self.windows,
            self.ranks.device,
            windows_at_once=min(64, config.training.micro_batch_size),
            # Experts would get no gradient through a head of zeros that rests.
            keeps_forecast=config.trainable.trains == "experts",
        )

    def micro_batches(self, step: int, ranks: Ranks) -> list[WindowBatch]:
        """Return this rank's micro-batches of a step."""
        return self.windows.micro_batches(step, ranks)

    def objective(self, step: int) -> Objective:  # noqa: ARG002
        """Return what every step is to minimise."""
        training = self.run.training
        return NextPatchObjective(error_unit=training.error_unit, target_clip=training.target_clip)

    def series_name(self, number: int) -> str:
        """Name a variate."""
        return self.split.table.variates[number]

    def error(self, model: TimeTracker, show: HeldOutForecasts | None = None) -> float:
        """Return the mean squared error of validation forecasts. Collective."""
        return self.validation.error(model, show)

    def start_error(self, like: TimeTracker, begun: float) -> float | None:
        """Return that of the start as it was, or from scratch of a fitted shortcut. Collective."""
        if self.start is None:
            return begun if self.fits_shortcut else None
        model = self.start.build().to(self.ranks.device)
        # In the precision that what learns is validated in.
        dtype = like.get_parameter("embed.values.weight").dtype
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self.validation.error(model)

    def settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint names, with the model and what it started from."""
        start = None if self.start is None else self.start.fingerprint
        model = encode(self.run.model)
        return {**encode(self.run.config), "model": model, "start_sha256": start}

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run must be continued with; the start counts by its weights."""
        sections = ("model", "start_sha256", "seed", "table", "trainable", "mixing", "optimizer")
        others = ("schedule", "balance", "dropout", "linear_shortcut")
        found = {name: settings.get(name) for name in (*sections, *others)}
        found["model"] = complete_model(found["model"] or {})
        # A baseline's alone, and which validation windows errors are compared on.
        found["table"] = {
            k: v for k, v in (found["table"] or {}).items() if k not in ("path", "season")
        }
        found["stopping.max_windows"] = (settings.get("stopping") or {}).get("max_windows")
        training, default = settings.get("training") or {}, encode(FinetuneTrainingConfig())
        for name in _LEARNED_BY:
            found[f"training.{name}"] = training.get(name, default[name])
        return found

    def hand_over(self, guard: Guard, *, device: torch.device, failure: str | None) -> RunResult:
        """Choose weights, measure them on the test part and write the package."""
        return hand_over(self.run, self.start, self.split, guard, device=device, failure=failure)


def prepare(model: TimeTracker, *, run: FinetuneRun, start: Start | None) -> None:
    """Load the start into the model, then say what learns."""
    prepare_start(model, run=run, start=start)
    prepare_finetuning(
        model,
        run.config.trainable,
        seed=run.seed,
        shortcut_learns=run.config.linear_shortcut != "least_squares",
    )


@torch.no_grad()
def prepare_start(model: TimeTracker, *, run: FinetuneRun, start: Start | None) -> None:
    """Make the model what it is before anything is learned.

    From scratch nothing is forecast beside a shortcut that is fitted, for it to miss.
    """
    if start is not None:
        start.load_into(model)
    elif run.config.linear_shortcut == "least_squares":
        for parameter in model.head.parameters():
            parameter.zero_()
