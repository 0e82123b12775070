"""The pretraining loop: set a run up, go through its steps, save, validate, end.

Everything that decides the numbers is a function of config, corpus and step, so that a run that
was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
import yaml

from data_pipeline.shards.reader import Corpus
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import StateReader
from tsmoe.checkpoint.layout import CheckpointMeta, write_text
from tsmoe.checkpoint.resume import check_same_model, newest_checkpoint
from tsmoe.checkpoint.saver import CheckpointSaver
from tsmoe.config import encode
from tsmoe.data.stream import Streamed
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.errors import CheckpointError, TrainingError
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.run_folder import CONFIG_FILE, DONE_MARKER, REQUEUE_MARKER, STOP_NOTE
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.open_data import RunData, check_stream, open_data, open_source
from tsmoe.train.order_check import check_same_order
from tsmoe.train.record import RunRecord
from tsmoe.train.run_config import RunConfig
from tsmoe.train.run_lock import run_lock
from tsmoe.train.schedule import balance_rate, learning_rate
from tsmoe.train.signals import StopRequest
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import StepReport, training_step, validation_loss
from tsmoe.train.telemetry import StepTelemetry

logger = logging.getLogger(__name__)


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped on request after saving"


def pretrain(config: RunConfig) -> Outcome:
    """Pretrain, or go on with a run that was interrupted. Every rank of the launcher calls it.

    Leaves in the run folder: config.yaml, metrics.jsonl, tensorboard/, checkpoints/ and a marker,
    `DONE` or `REQUEUE`.

    Raises:
        ConfigError: if the settings do not fit one another or the number of ranks.
        DataError: if the corpus is missing, damaged or too short.
        CheckpointError: if the run folder holds another run, or the last save failed.
        TrainingError: if the loss or the gradient is not finite.
    """
    config.check_world_size(ranks_module.launched_world_size())
    ranks = ranks_module.start(
        timeout_seconds=config.training.timeout_seconds, device=config.training.device
    )
    ranks = replace(ranks, meter=CommunicationMeter())
    with run_lock(Path(config.run), ranks):
        return _pretrain(config, ranks)


def _pretrain(config: RunConfig, ranks: Ranks) -> Outcome:
    """Open the corpus, go on from the newest checkpoint if there is one, and train."""
    run = Path(config.run)
    source = open_source(config, ranks)
    found = _find_checkpoint(config, source, ranks)
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    first_step, first_window = 0, 0
    if found is not None:
        folder, meta = found
        with StateReader(folder, meta) as reader:
            engine.restore(reader, step=meta.step)
        first_step, first_window = meta.step, meta.windows_seen
        if ranks.is_first:
            logger.info("going on from %s", folder)
    if first_step >= config.training.steps:
        if ranks.is_first:
            logger.info(
                "%s is done: step %d of %d; raise training.steps to go on, or choose another run=",
                run, first_step, config.training.steps,
            )  # fmt: skip
            (run / REQUEUE_MARKER).unlink(missing_ok=True)
            write_text(run / DONE_MARKER, f"{first_step}\n")
        return Outcome.DONE
    data = open_data(
        config,
        source,
        ranks,
        first_window=first_window,
        positions=None if found is None else found[1].stream,
    )
    if ranks.is_first:
        run.mkdir(parents=True, exist_ok=True)
        for marker in (DONE_MARKER, REQUEUE_MARKER):
            (run / marker).unlink(missing_ok=True)
        write_text(run / CONFIG_FILE, yaml.safe_dump(encode(config), sort_keys=False))
    return _train(config, engine, data, first_step, first_window)


def _train(
    config: RunConfig, engine: Engine, data: RunData, first_step: int, first_window: int
) -> Outcome:
    """Go through the remaining steps; save at intervals and at the end."""
    run, ranks, training = Path(config.run), engine.ranks, config.training
    course = _Course(config, data, ranks, first_step=first_step, first_window=first_window)
    saver = CheckpointSaver(run / "checkpoints", config.checkpoint, ranks)
    record = RunRecord(config, first_step=first_step, ranks=ranks)
    telemetry = StepTelemetry(engine)
    # The last save lies within the reach of the signals' handler: launchers send more than one, and
    # the checkpoint must be whole before any of them may end this process.
    with StopRequest(note=run / STOP_NOTE if ranks.is_first else None) as stop:
        with record, _saving_what_was_begun(saver):
            for step in range(first_step, training.steps):
                flags = (stop.is_set, saver.is_writing)
                report = _timed_step(config, engine, course, step, flags, telemetry, record)
                done = step + 1
                if step % training.log_every_steps == 0:
                    course.record_data(record, step)
                is_stopping, is_any_rank_writing = (count > 0 for count in report.flags)
                is_last = is_stopping or done == training.steps
                if saver.is_pending and not is_any_rank_writing:
                    saver.finish()
                if done % config.checkpoint.every_steps == 0 or is_last:
                    saver.begin(course.meta(done), engine.snapshot())
                if done % training.validate_every_steps == 0 or done == training.steps:
                    _validate(config, engine, data, record, step)
                if is_last:
                    break
        saver.close(must_succeed=True)
        outcome = Outcome.DONE if done == training.steps else Outcome.STOPPED
        if ranks.is_first:
            marker = DONE_MARKER if outcome is Outcome.DONE else REQUEUE_MARKER
            write_text(run / marker, f"{done}\n")
            logger.info("%s: %s at step %d of %d", run, outcome.value, done, training.steps)
    return outcome


class _Course:
    """The data of a run in order of step, from where this start of it begins."""

    def __init__(
        self, config: RunConfig, data: RunData, ranks: Ranks, *, first_step: int, first_window: int
    ) -> None:
        self.corpus = data.corpus
        self._config, self._data, self._ranks = config, data, ranks
        self._first_step, self._first_window = first_step, first_window
        self._passes = config.training.gradient_accumulation_steps(ranks.size)
        self._batches = data.load(
            config, num_batches=(config.training.steps - first_step) * self._passes
        )

    def next_micro_batches(self) -> list[WindowBatch]:
        """Return this rank's micro-batches of the next step, on its device."""
        return [b.to(self._ranks.device) for b in itertools.islice(self._batches, self._passes)]

    def windows_seen(self, done: int) -> int:
        """Count the windows of all ranks in the first `done` steps of the run."""
        steps = done - self._first_step
        return self._first_window + steps * self._config.training.global_batch_size

    def record_data(self, record: RunRecord, step: int) -> None:
        """Record what the data of the steps since the last such record was made of. Collective."""
        training, seen = self._config.training, self.windows_seen(step + 1)
        since = training.log_every_steps * training.global_batch_size
        record.mixed(step, self._data.source_shares(max(0, seen - since), seen))
        record.streamed(step, self._data.stream_counts(self._batches_read(step + 1), self._ranks))

    def meta(self, done: int) -> CheckpointMeta:
        """Say what a checkpoint after `done` steps needs to go on from. Collective."""
        return CheckpointMeta(
            step=done,
            windows_seen=self.windows_seen(done),
            config=encode(self._config),
            corpus_fingerprint=self.corpus.fingerprint,
            stream=self._data.stream_positions(self._batches_read(done), self._ranks),
        )

    def _batches_read(self, done: int) -> int:
        return (done - self._first_step) * self._passes


def _timed_step(
    config: RunConfig,
    engine: Engine,
    course: _Course,
    step: int,
    flags: tuple[bool, ...],
    telemetry: StepTelemetry,
    record: RunRecord,
) -> StepReport:
    """Wait for the data, do the step, and record what it did and took."""
    begun = time.monotonic()
    micro_batches = course.next_micro_batches()
    waited = time.monotonic() - begun
    telemetry.step_begins()
    report = _step(config, engine, course.corpus, micro_batches, step, flags, telemetry)
    times = {"seconds": time.monotonic() - begun, "seconds_waited": waited}
    telemetry.step_ended(**times)
    record.stepped(step, report, engine.model.routers(), **times)
    return report


def _step(
    config: RunConfig,
    engine: Engine,
    corpus: Corpus | Streamed,
    micro_batches: list[WindowBatch],
    step: int,
    flags: tuple[bool, ...],
    telemetry: StepTelemetry,
) -> StepReport:
    """Do one step with the rates and random numbers that belong to it."""
    seed_step(config.seed, step, engine.ranks.rank)
    steps = config.training.steps
    return training_step(
        engine,
        micro_batches,
        step=step,
        lr=learning_rate(step, steps=steps, peak=config.optimizer.lr, config=config.schedule),
        balance_rate=balance_rate(step, steps=steps, config=config.balance),
        objective=NextPatchObjective(
            error_unit=config.training.error_unit, target_clip=config.training.target_clip
        ),
        series_name=corpus.item_id,
        flags=flags,
        telemetry=telemetry,
    )


def _validate(
    config: RunConfig, engine: Engine, data: RunData, record: RunRecord, step: int
) -> None:
    """Measure the loss on held-out windows and record it, with some forecasts. Collective."""
    begun = time.monotonic()
    show = HeldOutForecasts(data.corpus.item_id) if engine.ranks.is_first else None
    loss = validation_loss(
        engine,
        data.validation,
        objective=NextPatchObjective(
            error_unit=config.training.error_unit, target_clip=config.training.target_clip
        ),
        show=show,
    )
    seconds = time.monotonic() - begun
    record.validated(step, loss, seconds=seconds, forecasts=show.found if show else ())


@contextmanager
def _saving_what_was_begun(saver: CheckpointSaver) -> Iterator[None]:
    """Commit a pending checkpoint before a training error ends the run, as all ranks meet it."""
    try:
        yield
    except TrainingError:
        saver.close(must_succeed=False)
        raise


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make the random numbers of a step a function of the step, so that none need saving."""
    digest = hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _find_checkpoint(
    config: RunConfig, corpus: Corpus | Streamed, ranks: Ranks
) -> tuple[Path, CheckpointMeta] | None:
    """Let the first rank look and check, and tell the others, so that all go on from the same."""

    def look() -> tuple[Path, CheckpointMeta] | None:
        found = newest_checkpoint(Path(config.run) / "checkpoints")
        if found is not None:
            check_stream(config, ranks, *found)
            _check_resumable(config, corpus, *found)
        return found

    return ranks.on_first(look)


def _check_resumable(
    config: RunConfig, corpus: Corpus | Streamed, folder: Path, meta: CheckpointMeta
) -> None:
    check_same_model(meta, encode(config), folder)
    check_same_order(config, folder, meta)
    if meta.corpus_fingerprint != corpus.fingerprint:
        what = "corpus" if config.stream is None else "stream"
        hint = "" if config.stream is None else " (its files are others now; pin stream.revision)"
        raise CheckpointError(
            f"{folder}: trained on a {what} with fingerprint {meta.corpus_fingerprint[:12]}, but "
            f"{corpus.path} has {corpus.fingerprint[:12]}{hint}; use that {what}, or another run="
        )
