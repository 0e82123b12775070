"""What a run does when a loss or gradient is not finite: stop, skip the step, or roll back.

All ranks meet such a step alike, as they look at sums over all of them. A step that is skipped
counts, but updates nothing. A roll-back goes back to the last checkpoint and on with the windows
that follow the bad step: those between are passed over, as what made the state go bad came before
it showed. Checkpoints remember both, so that a run that is started again goes on the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

from tsmoe.errors import TrainingError

logger = logging.getLogger(__name__)

OnNotFinite = Literal["stop", "skip", "roll_back"]

MAX_SKIPS_IN_A_ROW = 10
MAX_ROLL_BACKS_IN_A_ROW = 3
"""Without a step beyond the furthest bad one between them."""


class NotFiniteError(TrainingError):
    """A loss or gradient is not finite; nothing was updated, on no rank."""

    def __init__(
        self, message: str, *, step: int, what: str, series: list[str], flags: tuple[int, ...]
    ) -> None:
        super().__init__(message)
        self.step, self.what, self.series = step, what, series
        self.flags = flags
        """Of the step, summed over ranks: see `StepReport`."""


class NotFinitePolicy:
    """Decides what follows such a step, and remembers all of them."""

    def __init__(self, action: OnNotFinite, *, met_before: Iterable[dict[str, Any]] = ()) -> None:
        """Begin with what a checkpoint remembers."""
        self.action = action
        self.met = list(met_before)
        """As checkpoints keep them: `step`, `what`, `series`, `action`, and the `windows` that are
        not learned from, as a range in the order of the run; of a roll-back where it went `to`."""
        self._furthest = max((event["step"] for event in self.met), default=-1)
        self._in_a_row = 0

    def decide(self, error: NotFiniteError) -> None:
        """Take note of a bad step.

        Raises:
            NotFiniteError: if the run must stop.
        """
        if self.action == "stop":
            raise error
        self._in_a_row += 1
        self._furthest = max(self._furthest, error.step)
        limit = MAX_SKIPS_IN_A_ROW if self.action == "skip" else MAX_ROLL_BACKS_IN_A_ROW
        if self._in_a_row > limit:
            logger.error(
                "%d times in a row training.on_not_finite=%s did not help", limit, self.action
            )
            raise error

    def remember(self, error: NotFiniteError, windows: range, **more: int) -> dict[str, Any]:
        """Return what is remembered of a bad step whose windows are not learned from."""
        event = {
            "step": error.step,
            "what": error.what,
            "series": error.series,
            "action": self.action,
            "windows": [windows.start, windows.stop],
            **more,
        }
        self.met.append(event)
        return event

    def passed(self, step: int) -> None:
        """Take note of a step that was finite."""
        if step > self._furthest:
            self._in_a_row = 0
