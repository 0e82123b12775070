"""Write checkpoints in the background, and make them visible only when they are whole.

The training step waits for the copy to host memory, not for the disk. Each rank writes its files to
a hidden folder; when every rank says that it has, the first one adds meta.json, renames the folder
and moves `latest`. A run that is killed at any moment leaves whole checkpoints and hidden rubbish.
"""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tsmoe.checkpoint.elastic import Snapshot
from tsmoe.checkpoint.layout import (
    INCOMPLETE_PREFIX,
    LATEST_FILE,
    CheckpointMeta,
    FileRecord,
    sha256_of,
    step_folder,
    step_folders,
    sync_folder,
    write_tensors,
    write_text,
)
from tsmoe.config import Section
from tsmoe.errors import CheckpointError
from tsmoe.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """How often a run is saved and what is kept."""

    every_steps: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    milestone_every_steps: int | None = None
    """Checkpoints at multiples of this are kept for good."""

    def __post_init__(self) -> None:
        milestone = self.milestone_every_steps
        if self.every_steps < 1 or self.keep < 1 or (milestone is not None and milestone < 1):
            raise ValueError(
                f"every_steps ({self.every_steps}), keep ({self.keep}) and milestone_every_steps "
                f"({milestone}) must be at least 1"
            )


@dataclass(frozen=True)
class _Pending:
    meta: CheckpointMeta
    folder: Path
    written: Future[list[FileRecord]]


class CheckpointSaver:
    """Saves the snapshots of all ranks of a run, one checkpoint at a time."""

    def __init__(self, folder: Path, config: CheckpointConfig, ranks: Ranks) -> None:
        """Every rank must call it; the first one clears what an earlier run left half-written."""
        self.folder, self.config, self.ranks = folder, config, ranks
        self._protected: int | None = None
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"{INCOMPLETE_PREFIX}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        ranks.barrier()

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and not yet committed; equal on all ranks."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._pending is not None and not self._pending.written.done()

    def begin(self, meta: CheckpointMeta, snapshot: Snapshot) -> None:
        """Start to write this rank's files. Collective: waits for an earlier checkpoint first."""
        self.finish()
        folder = self.folder / f"{INCOMPLETE_PREFIX}{step_folder(meta.step)}"
        written = self._writer.submit(_write_files, folder, snapshot)
        self._pending = _Pending(meta, folder, written)

    def protect(self, step: int | None) -> None:
        """Keep the checkpoint of a step, whatever comes after it, until another is protected."""
        self._protected = step

    def finish(self) -> bool:
        """Wait for the pending checkpoint of all ranks and commit it.

        Collective. Returns False if a rank could not write its files: then nothing is left of the
        checkpoint, the earlier ones stay, and the error is logged with what to do.
        """
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        try:
            outcome: list[FileRecord] | str = pending.written.result()
        except Exception as error:
            # Whatever it is: a rank that left here would keep the others waiting below.
            outcome = f"rank {self.ranks.rank}: {type(error).__name__}: {error}"
        outcomes = self.ranks.gather(outcome)
        failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
        if self.ranks.is_first and not failures:
            files = tuple(
                r for records in outcomes for r in records if not isinstance(records, str)
            )
            try:
                self._commit(pending, files)
            except Exception as error:  # see above
                failures = [f"rank 0: {type(error).__name__}: {error}"]
        failures = self.ranks.gather(failures)[0]
        if failures:
            if self.ranks.is_first:
                shutil.rmtree(pending.folder, ignore_errors=True)
            logger.error(
                "%s: checkpoint of step %d was not saved (%s); earlier checkpoints are untouched; "
                "free some space or fix the folder",
                self.folder, pending.meta.step, "; ".join(failures),
            )  # fmt: skip
        return not failures

    def close(self, *, must_succeed: bool) -> None:
        """Finish and stop the writing thread. Collective.

        Raises:
            CheckpointError: if `must_succeed` and the last checkpoint was not saved.
        """
        is_saved = self.finish()
        self._writer.shutdown()
        if must_succeed and not is_saved:
            raise CheckpointError(
                f"{self.folder}: the last checkpoint could not be saved (reason above); free some "
                "space and start the same command again: it resumes from the checkpoint before"
            )

    def _commit(self, pending: _Pending, files: tuple[FileRecord, ...]) -> None:
        replace(pending.meta, files=files).write(pending.folder)
        final = self.folder / step_folder(pending.meta.step)
        if final.exists():
            # The same step again, after a resume from an older checkpoint.
            shutil.rmtree(final)
        pending.folder.rename(final)
        sync_folder(self.folder)
        logger.info("saved %s", final)
        try:
            write_text(self.folder / LATEST_FILE, final.name)
            self._prune(final)
        except (OSError, CheckpointError) as error:
            # The checkpoint is in its place, and a resume finds it without `latest` too.
            logger.warning("%s: could not tidy up after saving: %s", self.folder, error)

    def _prune(self, newest: Path) -> None:
        # Later steps are damaged ones that a resume passed over; the run will write over them.
        steps = [path for path in step_folders(self.folder) if path.name <= newest.name]
        milestone = self.config.milestone_every_steps
        for old in steps[: -self.config.keep]:
            step = int(old.name.removeprefix("step_"))
            if step != self._protected and (milestone is None or step % milestone):
                # Out of sight first, so that no half-deleted folder looks whole.
                hidden = old.rename(old.with_name(f"{INCOMPLETE_PREFIX}{old.name}"))
                shutil.rmtree(hidden)


def _write_files(folder: Path, snapshot: Snapshot) -> list[FileRecord]:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for name, tensors in snapshot.items():
        path = folder / name
        write_tensors(path, tensors)
        records.append(
            FileRecord(name=name, size_bytes=path.stat().st_size, sha256=sha256_of(path))
        )
    return records
