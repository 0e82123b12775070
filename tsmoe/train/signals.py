"""Stop on request: a signal sets a flag, the ranks agree on it, save the same step and end."""

from __future__ import annotations

import signal
import threading
from types import FrameType

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Turns SIGTERM, SIGUSR1 and the first Ctrl-C into a flag. Use as a context manager."""

    def __init__(self) -> None:
        self.is_set = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            return self  # signals reach the main thread alone
        for number in _STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            # A second Ctrl-C means now.
            raise KeyboardInterrupt
        self.is_set = True
