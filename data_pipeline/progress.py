"""How far a build is: a moving line on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from types import TracebackType
from typing import Protocol, Self

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Told about every series that was read."""

    def advance(self, source: str, points: int, series: int = 1) -> None:
        """Count series of a source and their points."""


class SilentProgress:
    """Says nothing."""

    def advance(self, source: str, points: int, series: int = 1) -> None:
        """Count nothing."""


class LineProgress:
    """Logs a line every ten seconds."""

    def __init__(self) -> None:
        self._series = 0
        self._points = 0
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def advance(self, source: str, points: int, series: int = 1) -> None:
        """Count series; log if it is time."""
        self._series += series
        self._points += points
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            logger.info("read %d series, %d points, at %s", self._series, self._points, source)


class TerminalProgress:
    """Keeps one moving line on a terminal while it is entered."""

    def __init__(self) -> None:
        import rich.console
        import rich.progress

        self._bar = rich.progress.Progress(
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.fields[series]:,} series, {task.completed:,} points"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=rich.console.Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, series=0)
        self._series = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, source: str, points: int, series: int = 1) -> None:
        """Count series."""
        self._series += series
        self._bar.update(self._task, advance=points, description=source, series=self._series)


def command_progress() -> TerminalProgress | LineProgress:
    """Choose the display that suits the standard error stream."""
    return TerminalProgress() if sys.stderr.isatty() else LineProgress()
