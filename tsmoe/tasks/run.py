"""A supervised run: open the tasks, train one model on them, hand it over with its figures."""

from __future__ import annotations

import json
import logging
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tsmoe import __version__
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.layout import step_folder, write_text
from tsmoe.checkpoint.package import model_from_checkpoint, save_package
from tsmoe.checkpoint.resume import open_checkpoint
from tsmoe.config import decode, encode
from tsmoe.errors import ConfigError, TrainingError
from tsmoe.finetune.course import Course
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.order import (
    ShuffledOrder,
    micro_batch_positions,
    share_of_rank,
    uniformly_spaced,
)
from tsmoe.heads.task import ForecastHead, ForecastHeadConfig
from tsmoe.models.older import complete_model
from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.tasks.anomaly import AnomalyTask
from tsmoe.tasks.classification import ClassificationTask
from tsmoe.tasks.config import (
    AnomalyTaskConfig,
    ClassificationTaskConfig,
    ForecastTaskConfig,
    ImputationTaskConfig,
    SeriesTaskConfig,
    TaskConfig,
    TaskRun,
    TaskRunConfig,
)
from tsmoe.tasks.fitted_shortcut import fit_shortcut
from tsmoe.tasks.forecast import TableForecastTask
from tsmoe.tasks.imputation import ImputationTask
from tsmoe.tasks.objective import TaskObjective, validation_errors
from tsmoe.tasks.predictor import TaskPredictor
from tsmoe.tasks.series import SeriesForecastTask
from tsmoe.tasks.task import Task, TaskEvaluation
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.loop import Outcome
from tsmoe.train.objective import Objective
from tsmoe.train.run_lock import run_lock

logger = logging.getLogger(__name__)

RESULT_FILE, PACKAGE_FOLDER = "result.json", "package"


@dataclass(frozen=True, kw_only=True)
class TaskRunResult:
    """What came of a run."""

    package: Path
    best_step: int
    verdict: str
    """One line for people."""
    evaluations: dict[str, TaskEvaluation]
    """By task."""
    model: PatchMoE


def train_tasks(
    config: TaskRunConfig, tasks: Mapping[str, Task] | None = None, *, evaluates: bool = True
) -> tuple[Outcome, TaskRunResult | None]:
    """Train, or go on with a run that was interrupted. Every rank of the launcher calls it.

    Leaves in the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, package/,
    result.json and a marker.

    Args:
        config: of the run.
        tasks: opened already; None opens the files that the config names.
        evaluates: whether the best weights are judged by the test parts.

    Returns:
        How it ended, and on the first rank what came of it, once it is done.

    Raises:
        ConfigError: if the settings do not fit one another, the data or the number of ranks.
        DataError: if a file can't be learned from.
        CheckpointError: if the run folder's checkpoints can't be used.
    """
    tasks = open_tasks(config) if tasks is None else tasks
    run = TaskRun.of(
        config, {name: task.head() for name, task in tasks.items()}, _context_length(tasks)
    )
    run.check_world_size(ranks_module.launched_world_size())
    ranks = ranks_module.start(
        timeout_seconds=config.training.timeout_seconds, device=config.training.device
    )
    ranks = replace(ranks, meter=CommunicationMeter())
    with run_lock(Path(run.run), ranks):
        return Course(run, TaskWork(run, tasks, ranks, evaluates=evaluates), ranks).go()


def open_tasks(config: TaskRunConfig) -> dict[str, Task]:
    """Read the files of all tasks."""
    return {
        name: open_task(name, task, config.path_of(name), model=config.model, seed=config.seed)
        for name, task in config.tasks.items()
    }


def open_task(name: str, task: TaskConfig, path: str, *, model: PatchMoEConfig, seed: int) -> Task:
    """Read the file of a task for a model of some length."""
    length, patch_length = model.context_length, model.patch_length
    match task:
        case ForecastTaskConfig():
            return TableForecastTask(name, task, path, context_length=length)
        case SeriesTaskConfig():
            return SeriesForecastTask(name, task, path, context_length=length)
        case ImputationTaskConfig():
            return ImputationTask(name, task, path, context_length=length, seed=seed)
        case AnomalyTaskConfig():
            return AnomalyTask(
                name, task, path, context_length=length, patch_length=patch_length, seed=seed
            )
        case ClassificationTaskConfig():
            return ClassificationTask(
                name, task, path, context_length=length, patch_length=patch_length, seed=seed
            )


def _context_length(tasks: Mapping[str, Task]) -> int:
    lengths = {name: task.context_length for name, task in tasks.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(
            "one model sees windows of one length, but tasks want "
            f"{', '.join(f'{name} {length}' for name, length in lengths.items())}; set "
            "fits_context=false of a classification task, and model.context_length for all"
        )
    return next(iter(lengths.values()))


class TaskWork:
    """The tasks of a run in turns: step t serves task t modulo their number."""

    doing = "training"
    error_name = "error"
    learns_all = True

    def __init__(
        self, run: TaskRun, tasks: Mapping[str, Task], ranks: Ranks, *, evaluates: bool = True
    ) -> None:
        self.run, self.tasks, self.ranks = run, dict(tasks), ranks
        self._evaluates = evaluates
        self._names = list(tasks)
        self._orders = {
            name: ShuffledOrder(task.num_train, run.seed) for name, task in tasks.items()
        }
        self._served: Task = self.tasks[self._names[0]]
        self.source = ", ".join(dict.fromkeys(task.source for task in tasks.values()))
        self.fingerprint = " ".join(task.fingerprint for task in tasks.values())
        self.num_windows = sum(task.num_train for task in tasks.values())

    @torch.no_grad()
    def prepare(self, model: PatchMoE, *, begins: bool) -> None:
        """Fit shortcuts that are least squares, which rest; all else learns. Collective."""
        for name, config in self.run.model.heads.items() if begins else ():
            if isinstance(config, ForecastHeadConfig) and config.shortcut == "least_squares":
                task = self.tasks[name]
                weight_QL = self.ranks.on_first(partial(fit_shortcut, task, model))
                head = model.heads[name]
                assert isinstance(head, ForecastHead)
                assert head.shortcut is not None, "asked for"
                head.shortcut.weight.copy_(weight_QL)

    def micro_batches(self, step: int, ranks: Ranks) -> list[WindowBatch]:
        """Return this rank's micro-batches of a step."""
        turn, place = divmod(step, len(self._names))
        name = self._names[place]
        self._served = task = self.tasks[name]
        training = self.run.training
        return [
            task.training_batch(self._orders[name].items(positions), positions).to(ranks.device)
            for positions in micro_batch_positions(
                turn,
                rank=ranks.rank,
                ranks=ranks.size,
                micro_batch_size=training.micro_batch_size,
                global_batch_size=training.global_batch_size,
            )
        ]

    def objective(self, step: int) -> Objective:
        """Return the error of the step's task and the balance loss."""
        task = self.tasks[self._names[step % len(self._names)]]
        return TaskObjective(
            loss_of_points=task.loss_of_points, balance=self.run.config.balance_loss
        )

    def series_name(self, number: int) -> str:
        """Name what a window of the last step was cut from."""
        return self._served.series_name(number)

    def error(self, model: PatchMoE, show: HeldOutForecasts | None = None) -> float:
        """Return the mean over tasks of their validation errors. Collective.

        Of points the mean squared error in the scaled unit, of classes the Brier score.
        """
        errors = {name: self._error_of(model, task, show) for name, task in self.tasks.items()}
        if len(errors) > 1 and self.ranks.is_first:
            each = ", ".join(f"{name} {error:.4f}" for name, error in errors.items())
            logger.info("validation error of each task: %s", each)
        return math.fsum(errors.values()) / len(errors)

    def start_error(self, like: PatchMoE, begun: float) -> float | None:  # noqa: ARG002
        """Return the error before the first step where that is a forecast, not chance."""
        heads = self.run.model.heads.values()
        begins_sensibly = all(getattr(head, "shortcut", None) is not None for head in heads)
        return begun if begins_sensibly else None

    def settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint names, with the model that the tasks ask for."""
        return {**encode(self.run.config), "model": encode(self.run.model)}

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run must be continued with."""
        settings = _with_defaults(settings)
        sections = ("model", "seed", "balance_loss", "optimizer", "schedule", "balance")
        found = {name: settings.get(name) for name in sections}
        paths = ("path", "test_path", "season")
        found["tasks"] = {
            name: {key: value for key, value in task.items() if key not in paths}
            for name, task in (settings.get("tasks") or {}).items()
        }
        # Whose turn it is, and which row of the embedding is a task's.
        found["order of tasks"] = list(settings.get("tasks") or {})
        for section, name in (("stopping", "max_windows"), ("training", "global_batch_size")):
            found[f"{section}.{name}"] = (settings.get(section) or {}).get(name)
        return found

    def hand_over(
        self, guard: Guard, *, device: torch.device, failure: str | None
    ) -> TaskRunResult:
        """Write the package of the best weights, and judge them on the test parts.

        Raises:
            TrainingError: if nothing learned is better than the weights of the beginning, and these
                are no forecast.
        """
        folder, step = Path(self.run.run), guard.best_step
        early = "" if failure is None else f"; training broke off: {failure}"
        is_start = step == 0 and guard.start_error is not None
        if step is None or (guard.errors[step] >= guard.errors[0] and not is_start):
            raise TrainingError(
                f"{folder}: nothing learned is better on validation than the weights it began "
                f"with (error {guard.errors.get(0, math.nan):.4f}); lower optimizer.lr "
                f"or give more training.steps{early}"
            )
        verdict = f"best after step {step}: validation error {guard.errors[step]:.4f}{early}"
        if is_start:
            verdict = (
                "nothing learned is better on validation than the shortcut it began with (error "
                f"{guard.errors[0]:.4f}), so the package holds that; a lower optimizer.lr or a "
                f"smaller model may help{early}"
            )
        logger.info("%s: %s", folder, verdict)
        model = model_from_checkpoint(*open_checkpoint(folder / "checkpoints" / step_folder(step)))
        assert isinstance(model, PatchMoE)
        cards = {name: task.card() for name, task in self.tasks.items()}
        # Before the test part is looked at, where something may be wrong: nothing learned is lost.
        package = folder / PACKAGE_FOLDER
        save_package(package, model, self._card(model, cards, step, verdict, {}))
        predictor = TaskPredictor(model, {"tasks": cards}, device)
        cards = {name: task.card(predictor) for name, task in self.tasks.items()}
        save_package(package, model, self._card(model, cards, step, verdict, {}))
        judged = self.tasks if self._evaluates else {}
        evaluations = {name: task.evaluate(predictor) for name, task in judged.items()}
        found = {name: evaluation.to_json_dict() for name, evaluation in evaluations.items()}
        card = self._card(model, cards, step, verdict, found)
        save_package(package, model.cpu(), card)
        result = {
            "verdict": verdict,
            "best_step": step,
            "validation_error": guard.as_json(),
            "test": found,
        }
        write_text(folder / RESULT_FILE, json.dumps(result, indent=1) + "\n")
        return TaskRunResult(
            package=package,
            best_step=step,
            verdict=verdict,
            evaluations=evaluations,
            model=model,
        )

    @torch.no_grad()
    def _error_of(self, model: PatchMoE, task: Task, show: HeldOutForecasts | None) -> float:
        ranks, size = self.ranks, self.run.training.micro_batch_size
        places = uniformly_spaced(task.num_validation, self.run.config.stopping.max_windows)
        places, is_own = share_of_rank(places, rank=ranks.rank, ranks=ranks.size)
        sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        was_training = model.training
        model.eval()
        for first in range(0, len(places), size):
            block = slice(first, first + size)
            batch = task.validation_batch(places[block]).to(ranks.device)
            with exact_onednn_matmul(ranks.device):
                output = model(**model.arguments(batch))
            if show is not None:
                show.see(model, batch, output, series_name=task.series_name)
            error_B, count_B = validation_errors(output.prediction, batch)
            counts_B = torch.from_numpy(is_own[block]).to(ranks.device)
            sums[0] += error_B.double()[counts_B].sum()
            sums[1] += count_B[counts_B].sum()
        model.train(was_training)
        total, count = ranks.sum(sums).tolist()
        return total / count if count else math.nan

    def _card(
        self,
        model: PatchMoE,
        cards: Mapping[str, Any],
        step: int,
        verdict: str,
        found: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {
            "made_by": f"tsmoe {__version__}",
            "made_on": datetime.now(UTC).isoformat(timespec="seconds"),
            "architecture": model.config.type,
            "step": step,
            "verdict": verdict,
            "parameters": {"total": sum(p.numel() for p in model.parameters())},
            "context_length": model.config.context_length,
            "patch_length": model.config.patch_length,
            "tasks": dict(cards),
            "config": encode(self.run.config),
            "data_fingerprint": self.fingerprint,
            "metrics": {name: evaluation["results"] for name, evaluation in found.items()},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "licence": "Apache-2.0 (weights); the training data keep their own licences",
        }


def _with_defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add settings that are younger than a checkpoint: they had their default then."""
    model = dict(settings.get("model") or {})
    without_heads = {**settings, "model": {**model, "heads": {}}}
    try:
        whole = encode(decode(TaskRunConfig, without_heads, origin="checkpoint"))
    except ConfigError:  # of another program: compared as it stands
        return settings
    return {**whole, "model": complete_model(model)}
