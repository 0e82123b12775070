"""The pretraining loop: set a run up, go through its steps, save, validate, end.

Everything that decides the numbers is a function of config, corpus and step, so that a run that
was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
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
from tsmoe.train.data_course import DataCourse
from tsmoe.train.held_out import HeldOutForecasts
from tsmoe.train.lost_ranks import lost_ranks_named
from tsmoe.train.not_finite import NotFiniteError, NotFinitePolicy
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.open_data import RunData, check_stream, open_data, open_quarantine, open_source
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
        TrainingError: if the loss or the gradient is not finite, and the policy does not help.
        LostRankError: if another rank is gone or does not answer.
    """
    config.check_world_size(ranks_module.launched_world_size())
    ranks = ranks_module.start(
        timeout_seconds=config.training.timeout_seconds, device=config.training.device
    )
    ranks = replace(ranks, meter=CommunicationMeter())
    # The last save, too, lies within the reach of the signals' handler: launchers send more than
    # one, and the checkpoint must be whole before any of them may end this process.
    stop = StopRequest(
        note=Path(config.run) / STOP_NOTE if ranks.is_first else None,
        stuck_seconds=config.training.stuck_seconds,
        timeout_seconds=config.training.timeout_seconds,
    )
    with stop, lost_ranks_named(ranks), run_lock(Path(config.run), ranks):
        return _pretrain(config, ranks, stop)


def _pretrain(config: RunConfig, ranks: Ranks, stop: StopRequest) -> Outcome:
    """Open the corpus, go on from the newest checkpoint if there is one, and train."""
    run = Path(config.run)
    source = open_source(config, ranks)
    quarantine = open_quarantine(config, source, ranks)
    found = _find_checkpoint(config, source, ranks)
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    first_step, first_window, met_before = 0, 0, []
    if found is not None:
        folder, meta = found
        with StateReader(folder, meta) as reader:
            engine.restore(reader, step=meta.updates)
        first_step, first_window, met_before = meta.step, meta.windows_seen, meta.not_finite
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
        quarantine=quarantine,
    )
    if ranks.is_first:
        run.mkdir(parents=True, exist_ok=True)
        for marker in (DONE_MARKER, REQUEUE_MARKER):
            (run / marker).unlink(missing_ok=True)
        write_text(run / CONFIG_FILE, yaml.safe_dump(encode(config), sort_keys=False))
    course = DataCourse(
        config, data, ranks, first_step=first_step, first_window=first_window, quarantine=quarantine
    )
    policy = NotFinitePolicy(config.training.on_not_finite, met_before=met_before)
    return _train(config, engine, data, course, policy, stop, first_step)


def _train(
    config: RunConfig,
    engine: Engine,
    data: RunData,
    course: DataCourse,
    policy: NotFinitePolicy,
    stop: StopRequest,
    first_step: int,
) -> Outcome:
    """Go through the remaining steps; save at intervals and at the end."""
    run, ranks, training = Path(config.run), engine.ranks, config.training
    saver = CheckpointSaver(run / "checkpoints", config.checkpoint, ranks)
    record = RunRecord(config, first_step=first_step, ranks=ranks)
    telemetry = StepTelemetry(engine)
    step, is_stopping = first_step, False
    with record, _saving_what_was_begun(saver):
        while step < training.steps and not is_stopping:
            flags: tuple[int, ...] = ()
            try:
                flags = _timed_step(config, engine, course, step, stop, saver, telemetry, record)
                policy.passed(step)
            except NotFiniteError as error:
                policy.decide(error)
                if policy.action == "roll_back":
                    step = _roll_back(config, engine, course, policy, saver, record, error)
                    continue
                _skip(config, engine.ranks, course, policy, record, error)
                flags = error.flags
            done = step + 1
            if step % training.log_every_steps == 0:
                course.record_data(record, step)
            is_stopping, is_any_rank_writing = (count > 0 for count in flags)
            if is_stopping:
                stop.noticed()
            if saver.is_pending and not is_any_rank_writing:
                saver.finish()
            if done % config.checkpoint.every_steps == 0 or is_stopping or done == training.steps:
                saver.begin(course.meta(done, not_finite=policy.met), engine.snapshot())
            if done % training.validate_every_steps == 0 or done == training.steps:
                _validate(config, engine, data, record, step)
            step = done
    saver.close(must_succeed=True)
    outcome = Outcome.DONE if step == training.steps else Outcome.STOPPED
    if ranks.is_first:
        marker = DONE_MARKER if outcome is Outcome.DONE else REQUEUE_MARKER
        write_text(run / marker, f"{step}\n")
        logger.info("%s: %s at step %d of %d", run, outcome.value, step, training.steps)
    return outcome


def _skip(
    config: RunConfig,
    ranks: Ranks,
    course: DataCourse,
    policy: NotFinitePolicy,
    record: RunRecord,
    error: NotFiniteError,
) -> None:
    """Go on without the update of a step, on all ranks alike."""
    if ranks.is_first:
        logger.warning("%s; skipped, as training.on_not_finite says", error)
    seen = course.windows_seen
    windows = range(seen - config.training.global_batch_size, seen)
    record.not_finite(error.step, policy.remember(error, windows))


def _roll_back(
    config: RunConfig,
    engine: Engine,
    course: DataCourse,
    policy: NotFinitePolicy,
    saver: CheckpointSaver,
    record: RunRecord,
    error: NotFiniteError,
) -> int:
    """Go back to the last checkpoint and on with the windows that come now. Collective.

    Returns:
        The step to go on with.
    """
    saver.finish()
    found = _find_checkpoint(config, course.corpus, engine.ranks)
    if found is None:
        raise TrainingError(
            f"{error}; training.on_not_finite is roll_back, but no checkpoint was saved before; "
            f"lower checkpoint.every_steps ({config.checkpoint.every_steps})"
        ) from error
    folder, meta = found
    with StateReader(folder, meta) as reader:
        engine.restore(reader, step=meta.updates)
    event = policy.remember(error, range(meta.windows_seen, course.windows_seen), to=meta.step)
    if engine.ranks.is_first:
        logger.warning(
            "%s; back to %s, and on after the windows [%d, %d)", error, folder, *event["windows"]
        )
    course.go_back(error.step + 1 - meta.step)
    record.go_back(meta.step)
    for event in policy.met:
        if event.get("to") == meta.step:
            record.not_finite(meta.step, event)
    return meta.step


def _timed_step(
    config: RunConfig,
    engine: Engine,
    course: DataCourse,
    step: int,
    stop: StopRequest,
    saver: CheckpointSaver,
    telemetry: StepTelemetry,
    record: RunRecord,
) -> tuple[int, ...]:
    """Wait for the data, do the step, and record what it did and took.

    Returns:
        Of how many ranks a stop was asked for, and how many are still writing a checkpoint.
    """
    begun = time.monotonic()
    micro_batches = course.next_micro_batches(step)
    waited = time.monotonic() - begun
    telemetry.step_begins()
    flags = (stop.is_set, saver.is_writing)
    with stop.step():
        report = _step(config, engine, course.corpus, micro_batches, step, flags, telemetry)
    times = {"seconds": time.monotonic() - begun, "seconds_waited": waited}
    telemetry.step_ended(**times)
    record.stepped(step, report, engine.model.routers(), **times)
    return report.flags


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
