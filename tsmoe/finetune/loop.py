"""The fine-tuning loop: start, step, validate, stop early, hand over the best."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tsmoe import ranks as ranks_module
from tsmoe.checkpoint.elastic import StateReader
from tsmoe.checkpoint.layout import CheckpointMeta, write_text
from tsmoe.checkpoint.resume import newest_checkpoint
from tsmoe.checkpoint.saver import CheckpointConfig, CheckpointSaver
from tsmoe.config import encode
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.errors import CheckpointError, TrainingError
from tsmoe.finetune.config import FinetuneConfig, FinetuneRun
from tsmoe.finetune.guard import Guard
from tsmoe.finetune.memory import check_memory
from tsmoe.finetune.result import RunResult, hand_over
from tsmoe.finetune.start import Start, open_start, resolve_run
from tsmoe.finetune.table import SplitTable, open_table
from tsmoe.finetune.trainable import count_trainable, prepare_finetuning
from tsmoe.finetune.validation import Validation
from tsmoe.finetune.windows import TableWindows
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.train.loop import DONE_MARKER, REQUEUE_MARKER, Outcome, seed_step
from tsmoe.train.record import RunRecord
from tsmoe.train.run_lock import run_lock
from tsmoe.train.schedule import balance_rate, learning_rate
from tsmoe.train.signals import StopRequest
from tsmoe.train.step import StepReport, training_step
from tsmoe.train.telemetry import StepTelemetry

logger = logging.getLogger(__name__)


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
    split = open_table(config.table, context_length=context_length)
    check_memory(run, split, ranks)
    with run_lock(Path(run.run), ranks):
        return _Course(run, start, split, ranks).go()


class _Course:
    """One start of a run, from its newest checkpoint to the end."""

    def __init__(
        self, run: FinetuneRun, start: Start | None, split: SplitTable, ranks: Ranks
    ) -> None:
        self.run, self.start, self.split, self.ranks = run, start, split, ranks
        self.folder = Path(run.run)
        self.windows = TableWindows(run, split)
        self.validation = Validation(run, split, ranks)
        self.guard = Guard(patience=run.config.stopping.patience)
        self.first_step = 0
        self.failure: str | None = None

    def go(self) -> tuple[Outcome, RunResult | None]:
        """Train what is left, then let the first rank hand over. Collective."""
        found = self._find_checkpoint()
        if found is not None and found[1].guard is not None:
            self.guard = Guard.of_json(found[1].guard, patience=self.guard.patience)
            self.first_step = found[1].step
        is_done = self.guard.is_exhausted or self.first_step >= self.run.training.steps
        outcome = Outcome.DONE if is_done else self._train(found)
        if outcome is Outcome.STOPPED:
            return outcome, None
        # The first rank alone, which may take long: the others have nothing to wait for.
        return outcome, self._hand_over() if self.ranks.is_first else None

    def _train(self, found: tuple[Path, CheckpointMeta] | None) -> Outcome:
        engine = build_engine(
            self.run, self.ranks, prepare=partial(prepare, run=self.run, start=self.start)
        )
        if found is not None:
            folder, meta = found
            with StateReader(folder, meta) as reader:
                engine.restore(reader, step=meta.step)
            if self.ranks.is_first:
                logger.info("going on from %s", folder)
        self._announce(engine)
        saver = CheckpointSaver(
            self.folder / "checkpoints",
            CheckpointConfig(keep=self.run.config.checkpoint.keep),
            self.ranks,
        )
        if not self.guard.errors:
            self._see_start(engine)
            self._save(saver, engine, 0)
        done = self._go_through_steps(engine, saver)
        is_stopped = not self.guard.is_exhausted and done < self.run.training.steps
        outcome = Outcome.STOPPED if is_stopped and self.failure is None else Outcome.DONE
        saver.close(must_succeed=True)
        if self.ranks.is_first and outcome is Outcome.STOPPED:
            write_text(self.folder / REQUEUE_MARKER, f"{done}\n")
            logger.info("%s: %s at step %d", self.folder, outcome.value, done)
        return outcome

    def _announce(self, engine: Engine) -> None:
        """Write down what is going to happen."""
        if not self.ranks.is_first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for marker in (DONE_MARKER, REQUEUE_MARKER):
            (self.folder / marker).unlink(missing_ok=True)
        text = yaml.safe_dump(encode(self.run.config), sort_keys=False)
        write_text(self.folder / "config.yaml", text)
        logger.info(
            "%s: %d training windows of %s, %s parameters learn",
            self.folder, self.windows.num_windows, self.split.table.path,
            f"{count_trainable(engine.model):,}",
        )  # fmt: skip

    def _see_start(self, engine: Engine) -> None:
        """Measure the start as it was pretrained, and the model before its first step."""
        if self.start is not None:
            model = self.start.build().to(self.ranks.device)
            # In the precision that what learns is validated in.
            dtype = engine.model.get_parameter("embed.values.weight").dtype
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
            self.guard.set_start(self.validation.error(model))
        self.guard.add(0, self.validation.error(engine.model))
        if self.ranks.is_first:
            of_start = self.guard.start_error
            logger.info(
                "validation MSE before the first step %.4f%s", self.guard.errors[0],
                "" if of_start is None else f", of the start as it was pretrained {of_start:.4f}",
            )  # fmt: skip

    def _go_through_steps(self, engine: Engine, saver: CheckpointSaver) -> int:
        """Train until the end, an early stop, a request to stop or a failure; return steps done."""
        training, done = self.run.training, self.first_step
        record = RunRecord(
            self.run,
            first_step=self.first_step,
            ranks=self.ranks,
            doing="fine-tuning",
            learns_all=self.run.config.trainable.learns_all,
        )
        telemetry = StepTelemetry(engine)
        with StopRequest() as stop, record:
            while done < training.steps:
                try:
                    report = self._step(engine, done, stop.is_set, telemetry, record)
                except TrainingError as error:
                    # All ranks meet it. What was best so far is still good.
                    self.failure = str(error)
                    logger.error("%s; keeping what was best before", error)
                    break
                done += 1
                is_stopping = report.flags[0] > 0
                if done % training.validate_every_steps == 0 or done == training.steps:
                    error_now = self.validation.error(engine.model)
                    self.guard.add(done, error_now)
                    record.validated(done - 1, error_now)
                    self._save(saver, engine, done)
                    if self.guard.is_exhausted:
                        break
                elif is_stopping:
                    self._save(saver, engine, done)
                if is_stopping:
                    break
        return done

    def _step(
        self,
        engine: Engine,
        step: int,
        is_stopping: bool,
        telemetry: StepTelemetry,
        record: RunRecord,
    ) -> StepReport:
        config, steps = self.run.config, self.run.training.steps
        begun = time.monotonic()
        micro_batches = self.windows.micro_batches(step, self.ranks)
        waited = time.monotonic() - begun
        telemetry.step_begins()
        seed_step(config.seed, step, self.ranks.rank)
        report = training_step(
            engine,
            micro_batches,
            step=step,
            lr=learning_rate(step, steps=steps, peak=config.optimizer.lr, config=config.schedule),
            balance_rate=balance_rate(step, steps=steps, config=config.balance),
            error_unit=config.training.error_unit,
            target_clip=config.training.target_clip,
            series_name=self.split.table.variates.__getitem__,
            flags=(is_stopping,),
            telemetry=telemetry,
        )
        times = {"seconds": time.monotonic() - begun, "seconds_waited": waited}
        telemetry.step_ended(**times)
        record.stepped(step, report, engine.model.routers(), **times)
        return report

    def _save(self, saver: CheckpointSaver, engine: Engine, done: int) -> None:
        """Save, and protect the best one so far. Collective."""
        meta = CheckpointMeta(
            step=done,
            windows_seen=done * self.run.training.global_batch_size,
            config=self._settings(),
            corpus_fingerprint=self.split.fingerprint,
            guard=self.guard.as_json(),
        )
        saver.protect(self.guard.best_step)
        saver.begin(meta, engine.snapshot())
        if not saver.finish():
            raise CheckpointError(
                f"{saver.folder}: the checkpoint of step {done} could not be saved (reason above); "
                "free some space and start the same command again"
            )

    def _find_checkpoint(self) -> tuple[Path, CheckpointMeta] | None:
        return self.ranks.on_first(self._look_for_checkpoint)

    def _look_for_checkpoint(self) -> tuple[Path, CheckpointMeta] | None:
        found = newest_checkpoint(self.folder / "checkpoints")
        if found is None:
            return None
        folder, meta = found
        here, there = _decisive(self._settings()), _decisive(meta.config)
        others = [key for key in here if there.get(key) != here[key]]
        if meta.guard is None or meta.corpus_fingerprint != self.split.fingerprint or others:
            what = "another table" if not others else f"other settings ({', '.join(others)})"
            raise CheckpointError(
                f"{folder}: a run with {what} is there; choose another run= or remove that folder"
            )
        return found

    def _settings(self) -> dict[str, Any]:
        """Return the settings that a checkpoint names, with the model and what it started from."""
        start = None if self.start is None else self.start.fingerprint
        model = encode(self.run.model)
        return {**encode(self.run.config), "model": model, "start_sha256": start}

    def _hand_over(self) -> RunResult:
        result = hand_over(
            self.run,
            self.start,
            self.split,
            self.guard,
            device=self.ranks.device,
            failure=self.failure,
        )
        (self.folder / REQUEUE_MARKER).unlink(missing_ok=True)
        write_text(self.folder / DONE_MARKER, f"{result.best_step}\n")
        return result


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run must be continued with; the start counts by its weights."""
    sections = ("model", "start_sha256", "seed", "table", "trainable", "mixing", "optimizer")
    found = {name: settings.get(name) for name in (*sections, "schedule", "balance", "dropout")}
    # A baseline's alone, and which validation windows errors are compared on.
    found["table"] = {
        k: v for k, v in (found["table"] or {}).items() if k not in ("path", "season")
    }
    found["stopping.max_windows"] = (settings.get("stopping") or {}).get("max_windows")
    return found


def prepare(model: TimeTracker, *, run: FinetuneRun, start: Start | None) -> None:
    """Load the start into the model, then say what learns."""
    if start is not None:
        start.load_into(model)
    prepare_finetuning(model, run.config.trainable, seed=run.seed)
