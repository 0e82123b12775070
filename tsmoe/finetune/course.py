"""The course of a run that learns until validation says enough: step, validate, stop, hand over.

It knows nothing of models and data: that is the run's work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import yaml

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import StateReader
from tsmoe.checkpoint.layout import CheckpointMeta, write_text
from tsmoe.checkpoint.resume import newest_checkpoint
from tsmoe.checkpoint.saver import CheckpointConfig, CheckpointSaver
from tsmoe.config import encode
from tsmoe.engine import EngineConfig
from tsmoe.engine.build import build_engine
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.engine.protocol import Engine
from tsmoe.errors import CheckpointError, TrainingError
from tsmoe.finetune.guard import Guard, PatienceConfig
from tsmoe.finetune.trainable import count_trainable
from tsmoe.models import ModelConfig
from tsmoe.ranks import Ranks
from tsmoe.run_folder import CONFIG_FILE, DONE_MARKER, REQUEUE_MARKER, STOP_NOTE
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.loop import Outcome, seed_step
from tsmoe.train.lost_ranks import lost_ranks_named
from tsmoe.train.not_finite import NotFiniteError, NotFinitePolicy
from tsmoe.train.objective import Objective
from tsmoe.train.record import RunRecord
from tsmoe.train.run_config import LoopConfig
from tsmoe.train.schedule import BalanceConfig, ScheduleConfig, balance_rate, learning_rate
from tsmoe.train.signals import StopRequest
from tsmoe.train.step import training_step
from tsmoe.train.telemetry import StepTelemetry

logger = logging.getLogger(__name__)

Result = TypeVar("Result", covariant=True)


class Keeps(Protocol):
    """How many checkpoints stay."""

    @property
    def keep(self) -> int: ...


class CourseConfig(Protocol):
    """The sections that every such run has."""

    @property
    def stopping(self) -> PatienceConfig: ...
    @property
    def schedule(self) -> ScheduleConfig: ...
    @property
    def balance(self) -> BalanceConfig: ...
    @property
    def checkpoint(self) -> Keeps: ...


class CourseRun(Protocol):
    """A run's configuration with the model that it comes to."""

    @property
    def config(self) -> CourseConfig: ...
    @property
    def run(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def training(self) -> LoopConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def engine(self) -> EngineConfig: ...

    def expert_parallel_size(self, world_size: int) -> int:
        """Ranks that share one set of experts."""
        ...


class Work(Protocol[Result]):
    """What is learned, from what, and what is made of it in the end."""

    doing: str
    """Such as `fine-tuning`."""
    error_name: str
    """What validation measures, such as `MSE`."""
    source: str
    """What is learned from, for people."""
    fingerprint: str
    """Of the data: a checkpoint is continued on the same numbers only."""
    num_windows: int
    learns_all: bool
    """Whether no weight rests but those of which the count of operations knows."""

    def prepare(self, model: Any, *, begins: bool) -> None:
        """Change a model as it was built before the engine takes it. Collective.

        Args:
            model: of this rank.
            begins: whether the run does; else weights come from a checkpoint.
        """
        ...

    def micro_batches(self, step: int, ranks: Ranks) -> list[WindowBatch]:
        """Return this rank's micro-batches of a step."""
        ...

    def objective(self, step: int) -> Objective:
        """Return what a step is to minimise."""
        ...

    def series_name(self, number: int) -> str:
        """Name a series by its number in a batch."""
        ...

    def error(self, model: Any, show: HeldOutForecasts | None = None) -> float:
        """Return the validation error; `show` takes some forecasts out. Collective."""
        ...

    def start_error(self, like: Any, begun: float) -> float | None:
        """Return that of what training starts from, if it can be handed over. Collective.

        Args:
            like: the model before its first step, whose precision is taken.
            begun: its error.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """Return all settings of the run as a checkpoint keeps them."""
        ...

    def decisive(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return those that must be equal for a run to go on."""
        ...

    def hand_over(self, guard: Guard, *, device: torch.device, failure: str | None) -> Result:
        """Write the package and what else comes of the run; the first rank alone calls it."""
        ...


class Course(Generic[Result]):
    """One start of a run, from its newest checkpoint to the end."""

    def __init__(self, run: CourseRun, work: Work[Result], ranks: Ranks) -> None:
        self.run, self.work, self.ranks = run, work, ranks
        self.folder = Path(run.run)
        self.guard = Guard(patience=run.config.stopping.patience)
        self.not_finite = NotFinitePolicy(run.training.on_not_finite)
        self.first_step = 0
        self.failure: str | None = None

    def go(self) -> tuple[Outcome, Result | None]:
        """Train what is left, then let the first rank hand over. Collective."""
        found = self._find_checkpoint()
        if found is not None and found[1].guard is not None:
            self.guard = Guard.of_json(found[1].guard, patience=self.guard.patience)
            self.first_step = found[1].step
            self.not_finite = NotFinitePolicy(
                self.not_finite.action, met_before=found[1].not_finite
            )
        is_done = self.guard.is_exhausted or self.first_step >= self.run.training.steps
        training = self.run.training
        stop = StopRequest(
            note=self.folder / STOP_NOTE if self.ranks.is_first else None,
            stuck_seconds=training.stuck_seconds,
            timeout_seconds=training.timeout_seconds,
        )
        outcome = Outcome.DONE
        if not is_done:
            with stop, lost_ranks_named(self.ranks):
                outcome = self._train(found, stop)
        if outcome is Outcome.STOPPED:
            return outcome, None
        # The first rank alone, which may take long: the others have nothing to wait for.
        return outcome, self._hand_over() if self.ranks.is_first else None

    def _train(self, found: tuple[Path, CheckpointMeta] | None, stop: StopRequest) -> Outcome:
        prepare = partial(self.work.prepare, begins=found is None)
        engine = build_engine(self.run, self.ranks, prepare=prepare)
        if found is not None:
            folder, meta = found
            with StateReader(folder, meta) as reader:
                engine.restore(reader, step=meta.updates)
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
        done = self._go_through_steps(engine, saver, stop)
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
        write_text(self.folder / CONFIG_FILE, text)
        logger.info(
            "%s: %d training windows of %s, %s parameters learn",
            self.folder, self.work.num_windows, self.work.source,
            f"{count_trainable(engine.model):,}",
        )  # fmt: skip

    def _see_start(self, engine: Engine) -> None:
        """Measure the start as it was, and the model before its first step."""
        begun = self.work.error(engine.model)
        start_error = self.work.start_error(engine.model, begun)
        if start_error is not None:
            self.guard.set_start(start_error)
        self.guard.add(0, begun)
        if self.ranks.is_first:
            of_start = self.guard.start_error
            logger.info(
                "validation %s before the first step %.4f%s",
                self.work.error_name, self.guard.errors[0],
                "" if of_start in (None, begun) else f", of the start as it was {of_start:.4f}",
            )  # fmt: skip

    def _go_through_steps(self, engine: Engine, saver: CheckpointSaver, stop: StopRequest) -> int:
        """Train until the end, an early stop, a request to stop or a failure; return steps done."""
        training, done = self.run.training, self.first_step
        record = RunRecord(
            self.run,
            first_step=self.first_step,
            ranks=self.ranks,
            doing=self.work.doing,
            learns_all=self.work.learns_all,
        )
        telemetry = StepTelemetry(engine)
        with record:
            while done < training.steps:
                try:
                    flags = self._step(engine, done, stop, telemetry, record)
                except TrainingError as error:
                    # All ranks meet it. What was best so far is still good.
                    self.failure = str(error)
                    logger.error("%s; keeping what was best before", error)
                    break
                done += 1
                is_stopping = flags[0] > 0
                if is_stopping:
                    stop.noticed()
                if done % training.validate_every_steps == 0 or done == training.steps:
                    self._validate(engine, record, done)
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
        stop: StopRequest,
        telemetry: StepTelemetry,
        record: RunRecord,
    ) -> tuple[int, ...]:
        """Do a step, or skip it where the policy says so; return of how many ranks a stop is asked.

        Raises:
            TrainingError: on all ranks, if training cannot go on.
        """
        config, steps = self.run.config, self.run.training.steps
        begun = time.monotonic()
        micro_batches = self.work.micro_batches(step, self.ranks)
        waited = time.monotonic() - begun
        telemetry.step_begins()
        seed_step(self.run.seed, step, self.ranks.rank)
        lr = learning_rate(step, steps=steps, peak=self.run.optimizer.lr, config=config.schedule)
        try:
            with stop.step():
                report = training_step(
                    engine,
                    micro_batches,
                    step=step,
                    lr=lr,
                    balance_rate=balance_rate(step, steps=steps, config=config.balance),
                    objective=self.work.objective(step),
                    series_name=self.work.series_name,
                    flags=(stop.is_set,),
                    telemetry=telemetry,
                )
        except NotFiniteError as error:
            self.not_finite.decide(error)
            if self.ranks.is_first:
                logger.warning("%s; skipped, as training.on_not_finite says", error)
            batch = self.run.training.global_batch_size
            windows = range(step * batch, (step + 1) * batch)
            record.not_finite(step, self.not_finite.remember(error, windows))
            return error.flags
        self.not_finite.passed(step)
        times = {"seconds": time.monotonic() - begun, "seconds_waited": waited}
        telemetry.step_ended(**times)
        record.stepped(step, report, engine.model.routers(), **times)
        return report.flags

    def _validate(self, engine: Engine, record: RunRecord, done: int) -> None:
        """Measure the error, remember and record it, with some forecasts. Collective."""
        begun = time.monotonic()
        show = HeldOutForecasts(self.work.series_name) if self.ranks.is_first else None
        error = self.work.error(engine.model, show)
        self.guard.add(done, error)
        seconds = time.monotonic() - begun
        record.validated(done - 1, error, seconds=seconds, forecasts=show.found if show else ())

    def _save(self, saver: CheckpointSaver, engine: Engine, done: int) -> None:
        """Save, and protect the best one so far. Collective."""
        meta = CheckpointMeta(
            step=done,
            windows_seen=done * self.run.training.global_batch_size,
            config=self.work.settings(),
            corpus_fingerprint=self.work.fingerprint,
            guard=self.guard.as_json(),
            not_finite=list(self.not_finite.met),
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
        here = self.work.decisive(self.work.settings())
        there = self.work.decisive(meta.config)
        others = [key for key in here if there.get(key) != here[key]]
        if meta.guard is None or meta.corpus_fingerprint != self.work.fingerprint or others:
            what = "other data" if not others else f"other settings ({', '.join(others)})"
            raise CheckpointError(
                f"{folder}: a run with {what} is there; choose another run= or remove that folder"
            )
        return found

    def _hand_over(self) -> Result:
        result = self.work.hand_over(self.guard, device=self.ranks.device, failure=self.failure)
        (self.folder / REQUEUE_MARKER).unlink(missing_ok=True)
        write_text(self.folder / DONE_MARKER, f"{self.guard.best_step}\n")
        return result
