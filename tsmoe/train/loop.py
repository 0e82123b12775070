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
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
import yaml

from data_pipeline.shards.reader import Corpus
from data_pipeline.shards.verify import verify_changed
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import StateReader
from tsmoe.checkpoint.layout import CheckpointMeta, write_text
from tsmoe.checkpoint.resume import check_same_model, newest_checkpoint
from tsmoe.checkpoint.saver import CheckpointSaver
from tsmoe.config import encode
from tsmoe.data.loader import TrainingBatches, ValidationBatches, load_training
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.windows import training_windows, validation_windows
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.errors import CheckpointError, DataError, TrainingError
from tsmoe.ranks import Ranks
from tsmoe.train.order_check import check_same_order
from tsmoe.train.record import RunRecord
from tsmoe.train.run_config import RunConfig
from tsmoe.train.run_lock import run_lock
from tsmoe.train.schedule import balance_rate, learning_rate
from tsmoe.train.signals import StopRequest
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import StepReport, training_step, validation_loss

logger = logging.getLogger(__name__)

DONE_MARKER, REQUEUE_MARKER = "DONE", "REQUEUE"


class Outcome(Enum):
    """How a run ended."""

    DONE = "done"
    STOPPED = "stopped on request after saving"


@dataclass(frozen=True)
class _Data:
    corpus: Corpus
    training: TrainingBatches
    validation: list[WindowBatch]


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
    with run_lock(Path(config.run), ranks):
        return _pretrain(config, ranks)


def _pretrain(config: RunConfig, ranks: Ranks) -> Outcome:
    """Open the corpus, go on from the newest checkpoint if there is one, and train."""
    run = Path(config.run)
    corpus = Corpus.open(config.corpus)
    if config.data.verifies_corpus:
        _verify(corpus, ranks)
    found = _find_checkpoint(config, corpus, ranks)
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
    data = _open_data(config, corpus, ranks, first_window)
    if ranks.is_first:
        run.mkdir(parents=True, exist_ok=True)
        for marker in (DONE_MARKER, REQUEUE_MARKER):
            (run / marker).unlink(missing_ok=True)
        write_text(run / "config.yaml", yaml.safe_dump(encode(config), sort_keys=False))
    return _train(config, engine, data, first_step, first_window)


def _train(
    config: RunConfig, engine: Engine, data: _Data, first_step: int, first_window: int
) -> Outcome:
    """Go through the remaining steps; save at intervals and at the end."""
    run, ranks, training = Path(config.run), engine.ranks, config.training
    passes = training.gradient_accumulation_steps(ranks.size)
    batches = load_training(
        data.training,
        num_batches=(training.steps - first_step) * passes,
        num_workers=config.data.num_workers,
        timeout_seconds=training.timeout_seconds,
    )
    saver = CheckpointSaver(run / "checkpoints", config.checkpoint, ranks)
    record = RunRecord(
        run,
        first_step=first_step,
        steps=training.steps,
        log_every_steps=training.log_every_steps,
        ranks=ranks,
    )
    # The last save lies within the reach of the signals' handler: launchers send more than one, and
    # the checkpoint must be whole before any of them may end this process.
    with StopRequest() as stop:
        with record, _saving_what_was_begun(saver):
            for step in range(first_step, training.steps):
                begun = time.monotonic()
                micro_batches = [b.to(ranks.device) for b in itertools.islice(batches, passes)]
                waited = time.monotonic() - begun
                flags = (stop.is_set, saver.is_writing)
                report = _step(config, engine, data.corpus, micro_batches, step, flags)
                record.stepped(
                    step,
                    report,
                    engine.model.routers(),
                    seconds=time.monotonic() - begun,
                    seconds_waited=waited,
                )
                done = step + 1
                windows_seen = first_window + (done - first_step) * training.global_batch_size
                if step % training.log_every_steps == 0:
                    since = training.log_every_steps * training.global_batch_size
                    begun_at = max(0, windows_seen - since)
                    record.mixed(step, data.training.source_shares(begun_at, windows_seen))
                is_stopping, is_any_rank_writing = (count > 0 for count in report.flags)
                is_last = is_stopping or done == training.steps
                if saver.is_pending and not is_any_rank_writing:
                    saver.finish()
                if done % config.checkpoint.every_steps == 0 or is_last:
                    saver.begin(_meta(config, data.corpus, done, windows_seen), engine.snapshot())
                if done % training.validate_every_steps == 0 or done == training.steps:
                    record.validated(step, _validate(config, engine, data.validation))
                if is_last:
                    break
        saver.close(must_succeed=True)
        outcome = Outcome.DONE if done == training.steps else Outcome.STOPPED
        if ranks.is_first:
            marker = DONE_MARKER if outcome is Outcome.DONE else REQUEUE_MARKER
            write_text(run / marker, f"{done}\n")
            logger.info("%s: %s at step %d of %d", run, outcome.value, done, training.steps)
    return outcome


def _step(
    config: RunConfig,
    engine: Engine,
    corpus: Corpus,
    micro_batches: list[WindowBatch],
    step: int,
    flags: tuple[bool, ...],
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
        error_unit=config.training.error_unit,
        target_clip=config.training.target_clip,
        series_name=corpus.item_id,
        flags=flags,
    )


def _validate(config: RunConfig, engine: Engine, batches: list[WindowBatch]) -> float:
    return validation_loss(
        engine,
        batches,
        error_unit=config.training.error_unit,
        target_clip=config.training.target_clip,
    )


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


def _open_data(config: RunConfig, corpus: Corpus, ranks: Ranks, first_window: int) -> _Data:
    lengths = {
        "window_length": config.model.window_length,
        "patch_length": config.model.patch_length,
    }
    index = training_windows(corpus, stride=config.data.window_stride, **lengths)
    if ranks.is_first and index.unusable_series:
        logger.warning(
            "%s: %d of %d series have no more than %d points before the split and are not used",
            corpus.path, index.unusable_series, corpus.num_series, config.model.patch_length,
        )  # fmt: skip
    packs = None
    if config.data.packs_short_series:
        packs = PackGather(
            corpus,
            index,
            seed=config.seed,
            patch_length=config.model.patch_length,
            patch_stride=config.model.patch_stride,
            is_pinned=ranks.device.type == "cuda",
        )
        if ranks.is_first:
            logger.info(
                "%s: %d series shorter than a window share %d windows",
                corpus.path, len(packs.packs.members), len(packs.packs.heads),
            )  # fmt: skip
    training = TrainingBatches(
        corpus,
        index,
        config.data,
        seed=config.seed,
        packs=packs,
        patch_mask=PatchMask(
            context_length=config.model.context_length,
            patch_length=config.model.patch_length,
            lookahead_patches=config.model.lookahead_patches,
        ),
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        ranks=ranks,
        first_window=first_window,
    )
    if ranks.is_first and (problem := training.cache_problem()):
        logger.warning("%s: %s", corpus.path, problem)
    validation = ValidationBatches(
        corpus,
        validation_windows(corpus, **lengths),
        max_windows=config.data.max_validation_windows,
        resident_shards=config.data.resident_shards,
        batch_size=config.training.micro_batch_size,
        ranks=ranks,
        packs=packs,
    )
    held = [validation[i].to(ranks.device) for i in range(len(validation))]
    return _Data(corpus=corpus, training=training, validation=held)


def _meta(config: RunConfig, corpus: Corpus, step: int, windows_seen: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step,
        windows_seen=windows_seen,
        config=encode(config),
        corpus_fingerprint=corpus.fingerprint,
    )


def _verify(corpus: Corpus, ranks: Ranks) -> None:
    """Let the first rank check the shards that have changed since, and tell the others."""
    problems = ranks.gather(verify_changed(corpus) if ranks.is_first else [])[0]
    if problems:
        raise DataError(f"{corpus.path}: {'; '.join(problems)}; build or copy the corpus again")


def _find_checkpoint(
    config: RunConfig, corpus: Corpus, ranks: Ranks
) -> tuple[Path, CheckpointMeta] | None:
    """Let the first rank look and check, and tell the others, so that all go on from the same."""
    outcome: tuple[Path, CheckpointMeta] | CheckpointError | None = None
    if ranks.is_first:
        try:
            outcome = newest_checkpoint(Path(config.run) / "checkpoints")
            if outcome is not None:
                _check_resumable(config, corpus, *outcome)
        except CheckpointError as error:
            outcome = error
    outcome = ranks.gather(outcome)[0]
    if isinstance(outcome, CheckpointError):
        raise outcome
    return outcome


def _check_resumable(config: RunConfig, corpus: Corpus, folder: Path, meta: CheckpointMeta) -> None:
    check_same_model(meta, encode(config), folder)
    if meta.corpus_fingerprint != corpus.fingerprint:
        raise CheckpointError(
            f"{folder}: trained on a corpus with fingerprint {meta.corpus_fingerprint[:12]}, but "
            f"{corpus.path} has {corpus.fingerprint[:12]}; use that corpus, or another run="
        )
    check_same_order(config, folder, meta)
