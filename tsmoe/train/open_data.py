"""Open what a run is trained on: a corpus, or a data set that is streamed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.errors import DamagedFileError, ShardError
from data_pipeline.shards.reader import Corpus
from data_pipeline.shards.verify import find_damaged, verify_changed
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.data.loader import TrainingBatches, ValidationBatches, load_training
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.patch_mask import PatchMask
from tsmoe.data.quarantine import Quarantine
from tsmoe.data.read_ahead import ReadAhead
from tsmoe.data.stream import StreamBatches, Streamed, load_stream, stream_validation
from tsmoe.data.windows import training_windows, validation_windows
from tsmoe.errors import CheckpointError, DataError
from tsmoe.ranks import Ranks
from tsmoe.run_folder import QUARANTINE_FILE
from tsmoe.train.run_config import RunConfig

logger = logging.getLogger(__name__)

QUARANTINE_HINT = "set data.on_bad_shard=quarantine to go on without a bad shard"

T = TypeVar("T")


@dataclass(frozen=True)
class RunData:
    """Training batches from where the run stands, and the batches that are validated on."""

    corpus: Corpus | Streamed
    training: TrainingBatches | StreamBatches
    validation: list[WindowBatch]

    def load(
        self, config: RunConfig, *, num_batches: int, first_batch: int = 0
    ) -> ReadAhead[WindowBatch]:
        """Iterate over micro-batches of this rank; those of a stream from the first one on."""
        settings: dict[str, Any] = {  # Any: an int and a float
            "num_batches": num_batches,
            "num_workers": config.data.num_workers,
            # A rank that waits for its data says so before the others wait for it in vain.
            "timeout_seconds": 0.9 * config.training.timeout_seconds,
        }
        if isinstance(self.training, StreamBatches):
            return load_stream(self.training, **settings)
        return load_training(self.training, first_batch=first_batch, **settings)

    def source_shares(self, begin: int, end: int) -> dict[str, float]:
        """Part of each source in the windows [begin, end); empty where it is not known ahead."""
        if isinstance(self.training, StreamBatches):
            return {}
        return self.training.source_shares(begin, end)

    def stream_counts(self, num_batches: int, ranks: Ranks) -> dict[str, Any]:
        """Epoch, and series used and not used up to there, of all ranks; empty for a corpus.

        As of the blocks that the batches so far are from. Collective where the run streams.
        """
        if not isinstance(self.training, StreamBatches):
            return {}
        of_ranks = ranks.gather(self.training.counts_after(num_batches))
        drops: Counter[str] = Counter()
        for counts in of_ranks:
            drops.update(counts["drops"])
        return {
            "epoch": min(counts["epoch"] for counts in of_ranks),
            "used": sum(counts["used"] for counts in of_ranks),
            "drops": dict(sorted(drops.items())),
        }

    def stream_positions(self, num_batches: int, ranks: Ranks) -> list[dict[str, Any]] | None:
        """Where each rank stands in its stream after so many batches; None for a corpus.

        Collective where the run streams: every rank must call it.
        """
        if isinstance(self.training, StreamBatches):
            return ranks.gather(self.training.position_after(num_batches))
        return None


def open_source(config: RunConfig, ranks: Ranks) -> Corpus | Streamed:
    """Open the corpus, or the definition of the stream. Collective.

    Raises:
        DataError: if it is missing, damaged, or cannot be reached.
    """
    if config.stream is None:
        assert config.corpus is not None, "checked by the configuration"
        tolerates = config.data.on_bad_shard == "quarantine"
        try:
            corpus = Corpus.open(config.corpus, tolerates_bad_shards=tolerates)
        except DamagedFileError as error:
            raise _with_hint(error) from error
        if config.data.verifies_corpus and not tolerates:
            _verify(corpus, ranks)
        return corpus
    stream = config.stream
    return _on_all(ranks, lambda: Streamed(stream))


def open_quarantine(
    config: RunConfig, source: Corpus | Streamed, ranks: Ranks
) -> Quarantine | None:
    """Look for bad shards and put them aside, where the run is to go on without them. Collective.

    Every rank looks at the sizes of the files that it sees, and the first one at their content.

    Raises:
        DataError: if too much is lost.
    """
    if config.data.on_bad_shard == "stop" or not isinstance(source, Corpus):
        return None
    quarantine = Quarantine(source, Path(config.run) / QUARANTINE_FILE, ranks)

    def look() -> dict[str, str]:
        if ranks.is_first and config.data.verifies_corpus:
            return find_damaged(source)
        # Another node may see other files; of a remote store all see the same.
        is_worth_it = ranks.is_first or source.store.is_local
        return source.manifest.find_wrong_sizes(source.store) if is_worth_it else {}

    problems = _on_all(ranks, look)
    quarantine.add_files(problems, step=0)
    return quarantine


def check_stream(config: RunConfig, ranks: Ranks, folder: object, meta: CheckpointMeta) -> None:
    """Refuse to go on with a stream that was read in another way.

    Raises:
        CheckpointError: naming both.
    """
    if (config.stream is None) != (meta.stream is None):
        raise CheckpointError(
            f"{folder}: trained {'on a corpus' if meta.stream is None else 'from a stream'}, but "
            f"this run is {'on a corpus' if config.stream is None else 'from a stream'}; use the "
            "same, or another run="
        )
    if meta.stream is not None and len(meta.stream) != ranks.size:
        raise CheckpointError(
            f"{folder}: streamed by {len(meta.stream)} ranks, but there are {ranks.size}; start as "
            "many, or build a corpus (`tsmoe data build`), which any number of ranks can go on with"
        )


def open_data(
    config: RunConfig,
    source: Corpus | Streamed,
    ranks: Ranks,
    *,
    first_window: int,
    positions: list[dict[str, Any]] | None,
    quarantine: Quarantine | None = None,
) -> RunData:
    """Open the batches of this rank. Collective.

    Args:
        config: of the run.
        source: what `open_source` gave.
        ranks: all processes of the run.
        first_window: windows of all ranks that were seen before.
        positions: of the ranks in the stream, from a checkpoint.
        quarantine: takes shards that cannot be read.

    Raises:
        DataError: if the data cannot be read.
    """
    model = config.model
    patch_mask = PatchMask(
        context_length=model.context_length,
        patch_length=model.patch_length,
        lookahead_patches=model.lookahead_patches,
    )
    if isinstance(source, Corpus):
        while True:
            bad = None
            try:
                data = _open_corpus(config, source, ranks, patch_mask, first_window)
            except ShardError as error:
                if quarantine is None:
                    raise _with_hint(error) from error
                bad = error
            if quarantine is None or not quarantine.agree(bad, step=0):
                return data
    position = None if positions is None else positions[ranks.rank]
    return _on_all(
        ranks, lambda: _open_stream(config, source, ranks, patch_mask, first_window, position)
    )


def _open_stream(
    config: RunConfig,
    streamed: Streamed,
    ranks: Ranks,
    patch_mask: PatchMask,
    first_window: int,
    position: dict[str, Any] | None,
) -> RunData:
    training = StreamBatches(
        streamed,
        seed=config.seed,
        window_length=config.model.window_length,
        patch_mask=patch_mask,
        mixup_share=config.data.mixup_share,
        micro_batch_size=config.training.micro_batch_size,
        ranks=ranks,
        first_window=first_window,
        position=position,
    )
    validation = stream_validation(
        streamed,
        window_length=config.model.window_length,
        patch_length=config.model.patch_length,
        max_windows=config.data.max_validation_windows,
        batch_size=config.training.micro_batch_size,
        ranks=ranks,
    )
    return RunData(streamed, training, [batch.to(ranks.device) for batch in validation])


def _open_corpus(
    config: RunConfig, corpus: Corpus, ranks: Ranks, patch_mask: PatchMask, first_window: int
) -> RunData:
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
        patch_mask=patch_mask,
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
    return RunData(corpus=corpus, training=training, validation=held)


def _on_all(ranks: Ranks, make: Callable[[], T]) -> T:
    """Make something on every rank; where one cannot, all end, and none waits for it. Collective.

    Raises:
        DataError: if this rank could not, or another.
    """
    outcome: T | DataError
    try:
        outcome = make()
    except DataError as error:
        outcome = error
    errors = ranks.gather(str(outcome) if isinstance(outcome, DataError) else None)
    if isinstance(outcome, DataError):
        raise outcome
    for rank, text in enumerate(errors):
        if text is not None:
            raise DataError(f"rank {rank} says: {text}")
    return outcome


def _verify(corpus: Corpus, ranks: Ranks) -> None:
    """Let the first rank check the shards that have changed since, and tell the others."""
    problems = ranks.gather(verify_changed(corpus) if ranks.is_first else [])[0]
    if problems:
        raise DataError(
            f"{corpus.path}: {'; '.join(problems)}; build or copy the corpus again, or "
            f"{QUARANTINE_HINT}"
        )


def _with_hint(error: DamagedFileError) -> DataError:
    return DataError(f"{error}; or {QUARANTINE_HINT}")
