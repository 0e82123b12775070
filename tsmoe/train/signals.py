"""Stop on request: a signal or a note sets a flag, the ranks agree, save the same step and end.

Signals reach the ranks of one machine, and not through every launcher; a note in the run folder
reaches all.

A launcher may block the signals until somebody here can take them, and it may send them because
another rank is gone. Then the step that this rank is in never ends, and so it has a timer of its
own: a node must not be held by a process that waits for nobody.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

logger = logging.getLogger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# What a launcher may have blocked for the time before a handler stands.
_BLOCKED_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A step that takes so many times as long as the longest before it is stuck.
_STUCK_TIMES = 3
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_LOOKS_FOR_NOTE = 1.0


def unblock_stop_signals() -> None:
    """Let signals through that the launcher blocked; those that came meanwhile come now."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED_SIGNALS)


class StopRequest:
    """Turns SIGTERM, SIGUSR1, the first Ctrl-C and a note into a flag. Use as a context manager.

    The note is a file that somebody makes in the run folder; one rank that looks for it is enough.

    Once a stop was asked for, the step at hand may last `stuck_seconds`, or three times as long as
    the longest before, and all that is not a step `timeout_seconds`; then the process ends itself.
    When the ranks agree to stop, `noticed` ends this watch: a save is never cut.
    """

    def __init__(
        self,
        *,
        note: Path | None = None,
        stuck_seconds: float = 20.0,
        timeout_seconds: float = 600.0,
    ) -> None:
        self._is_asked = False
        self._note, self._looked = note, float("-inf")
        self._stuck_seconds, self._timeout_seconds = stuck_seconds, timeout_seconds
        self._former: dict[signal.Signals, object] = {}
        self._former_wakeup = -1
        self._wakeup: tuple[int, int] | None = None
        self._is_noticed = threading.Event()
        self._step_begun: float | None = None
        self._longest_step: float | None = None
        self._steps = 0

    @property
    def is_set(self) -> bool:
        """Whether a signal came, or the note is there; that is looked for once a second."""
        now = time.monotonic()
        if self._note is not None and now - self._looked > _SECONDS_BETWEEN_LOOKS_FOR_NOTE:
            self._looked = now
            self._is_asked |= self._is_there(self._note)
        return self._is_asked

    @staticmethod
    def _is_there(note: Path) -> bool:
        # One that was left before this process began asked an earlier start of the run. But
        # `tsmoe launch` clears those away, and what comes while ranks are started is for them.
        begun = 0.0 if "TSMOE_RANKS" in os.environ else psutil.Process().create_time()
        try:
            return note.stat().st_mtime >= begun
        except FileNotFoundError:
            return False

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals reach the main thread alone
        # A handler runs between two lines of Python, and a rank that waits for another one is
        # within one. What is written to this pipe is written at once, and a thread reads it.
        self._wakeup = os.pipe()
        os.set_blocking(self._wakeup[1], False)
        self._former_wakeup = signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()
        unblock_stop_signals()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_noticed.set()
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._wakeup is not None:
            signal.set_wakeup_fd(self._former_wakeup)
            os.close(self._wakeup[1])  # ends the watch, which closes the other end

    @contextmanager
    def step(self) -> Iterator[None]:
        """Tell that the body is a step, which lasts about as long as those before."""
        self._step_begun = begun = time.monotonic()
        try:
            yield
        finally:
            self._step_begun = None
        self._steps += 1
        if self._steps > 1:  # the first one compiles and allocates
            self._longest_step = max(self._longest_step or 0.0, time.monotonic() - begun)

    def noticed(self) -> None:
        """Tell that all ranks have agreed to stop."""
        self._is_noticed.set()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._is_asked and number == signal.SIGINT:
            # A second Ctrl-C means now.
            raise KeyboardInterrupt
        self._is_asked = True

    def _watch(self) -> None:
        """Wait for the first signal, then for the ranks to agree; end the process if they don't."""
        assert self._wakeup is not None
        reading = self._wakeup[0]
        try:
            while came := os.read(reading, 64):
                if not set(came).isdisjoint(_STOP_SIGNALS):
                    break
        finally:
            os.close(reading)
        asked = time.monotonic()
        while came and not self._is_noticed.wait(_SECONDS_BETWEEN_LOOKS):
            begun, now = self._step_begun, time.monotonic()
            if now - max(asked, begun or asked) > self._limit_seconds(in_step=begun is not None):
                logger.error(
                    "asked to stop %.0f s ago, but %s: another rank may be gone; this process "
                    "ends without saving; start the same command again: it resumes from the last "
                    "checkpoint (training.stop_seconds sets how long a step may be stuck)",
                    now - asked,
                    "training has not gone on" if begun is None else "the step does not end",
                )
                os._exit(1)

    def _limit_seconds(self, *, in_step: bool) -> float:
        if not in_step or self._longest_step is None:
            return self._timeout_seconds
        return max(self._stuck_seconds, _STUCK_TIMES * self._longest_step)
