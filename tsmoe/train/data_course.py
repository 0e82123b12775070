"""The windows of a run in the order of its steps, from where one start of it begins."""

from __future__ import annotations

import itertools
from typing import Any

from data_pipeline.errors import ShardError
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.layout import CheckpointMeta
from tsmoe.config import encode
from tsmoe.data.quarantine import Quarantine
from tsmoe.data.read_ahead import ReadAhead
from tsmoe.errors import DataError
from tsmoe.ranks import Ranks
from tsmoe.train.open_data import QUARANTINE_HINT, RunData
from tsmoe.train.record import RunRecord
from tsmoe.train.run_config import RunConfig


class DataCourse:
    """Hands out the micro-batches of each step, and knows how far it has come."""

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        ranks: Ranks,
        *,
        first_step: int,
        first_window: int,
        quarantine: Quarantine | None = None,
    ) -> None:
        """Begin at a step and window; with a quarantine, bad shards go there. Collective."""
        self.corpus = data.corpus
        self._config, self._data, self._ranks = config, data, ranks
        self._quarantine = quarantine
        self._first_window = first_window
        self._passes = config.training.gradient_accumulation_steps(ranks.size)
        self._steps_drawn = 0
        self._steps_to_draw = config.training.steps - first_step
        self._batches = self._load()

    def next_micro_batches(self, step: int) -> list[WindowBatch]:
        """Return this rank's micro-batches of the next step, on its device.

        Collective where there is a quarantine: all ranks leave out what one of them can't read.

        Raises:
            DataError: if they cannot be read.
        """
        while True:
            batches, bad = [], None
            try:
                batches = list(itertools.islice(self._batches, self._passes))
            except ShardError as error:
                if self._quarantine is None:
                    raise DataError(f"{error}; or {QUARANTINE_HINT}") from error
                bad = error
            if self._quarantine is None or not self._quarantine.agree(bad, step=step):
                self._steps_drawn += 1
                return [batch.to(self._ranks.device) for batch in batches]
            # What was read ahead may hold windows of the shard: all of it is cut again.
            self._batches.close()
            self._batches = self._load()

    def go_back(self, num_steps: int) -> None:
        """Make room for steps that are done again; windows go on, those seen are passed over."""
        self._steps_to_draw += num_steps
        self._batches.extend(num_steps * self._passes)

    @property
    def windows_seen(self) -> int:
        """Windows of all ranks that were handed out since the beginning of the run."""
        return self._first_window + self._steps_drawn * self._config.training.global_batch_size

    def record_data(self, record: RunRecord, step: int) -> None:
        """Record what the data of the steps since the last such record was made of. Collective."""
        training, seen = self._config.training, self.windows_seen
        since = training.log_every_steps * training.global_batch_size
        record.mixed(step, self._data.source_shares(max(0, seen - since), seen))
        record.streamed(step, self._data.stream_counts(self._batches_read, self._ranks))

    def meta(self, done: int, *, not_finite: list[dict[str, Any]]) -> CheckpointMeta:
        """Say what a checkpoint after `done` steps needs to go on from. Collective."""
        return CheckpointMeta(
            step=done,
            windows_seen=self.windows_seen,
            config=encode(self._config),
            corpus_fingerprint=self.corpus.fingerprint,
            stream=self._data.stream_positions(self._batches_read, self._ranks),
            not_finite=list(not_finite),
        )

    @property
    def _batches_read(self) -> int:
        return self._steps_drawn * self._passes

    def _load(self) -> ReadAhead[WindowBatch]:
        return self._data.load(
            self._config,
            first_batch=self._batches_read,
            num_batches=(self._steps_to_draw - self._steps_drawn) * self._passes,
        )
