"""Show how a run goes: a bar on a terminal, plain lines elsewhere; the first rank only."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tsmoe.train.throughput import Throughput

logger = logging.getLogger(__name__)


class TrainingProgress:
    """Use as a context manager; silent where `is_shown` is False."""

    def __init__(
        self, *, steps: int, first_step: int, log_every_steps: int, is_shown: bool, doing: str
    ) -> None:
        self._steps, self._first_step = steps, first_step
        self._log_every_steps = log_every_steps
        self._is_shown = is_shown
        self._begun = time.monotonic()
        self._validation = ""
        self._bar: Progress | None = None
        if is_shown and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(doing),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=steps, completed=first_step, status="")

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def validated(self, loss: float) -> None:
        """Remember the newest validation loss."""
        self._validation = f"validation {loss:.4f}  "

    def advanced(self, done: int, *, loss: float, speed: Throughput) -> None:
        """Show that `done` steps are done."""
        status = f"loss {loss:.4f}  {self._validation}{speed.points_per_second:,.0f} points/s"
        if speed.mfu is not None:
            status += f"  MFU {speed.mfu:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, status=status)
        elif self._is_shown and (done % self._log_every_steps == 0 or done == self._steps):
            seconds = time.monotonic() - self._begun
            left = seconds / max(1, done - self._first_step) * (self._steps - done)
            logger.info("step %d of %d  %s  %.0f s left", done, self._steps, status, left)
