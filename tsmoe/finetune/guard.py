"""When training ends early, which weights are kept, and that worse ones are not handed over."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tsmoe.config import Section


@dataclass(frozen=True, kw_only=True)
class PatienceConfig(Section):
    """Early stop by the error on the validation part."""

    patience: int = 6
    """Validations in a row without a new best one before training ends."""
    max_windows: int = 1024
    """Validation windows that are used each time, uniformly spaced."""

    def __post_init__(self) -> None:
        if self.patience < 1 or self.max_windows < 1:
            raise ValueError(
                f"patience ({self.patience}) and max_windows ({self.max_windows}) must be at "
                "least 1"
            )


@dataclass(frozen=True, kw_only=True)
class StoppingConfig(PatienceConfig):
    """Early stop of what begins with a start that is good already."""

    mixes_with_start: bool = True
    """Hand over weights on the way from the start's to the learned: that of 25, 50, 75 and 100 %
    which validates best (WiSE-FT, arXiv 2109.01903)."""


@dataclass
class Guard:
    """Remembers the error after each validation; errors are mean squares, lower is better.

    One that is not finite counts as infinite.
    """

    patience: int
    start_error: float | None = None
    """Of the start as it was, or of a shortcut that makes a forecast before the first step; None
    where what stands there is chance."""
    errors: dict[int, float] = field(default_factory=dict)
    """By steps done, in order."""

    def add(self, step: int, error: float) -> None:
        """Note the error after `step` steps."""
        self.errors[step] = error if math.isfinite(error) else math.inf

    def set_start(self, error: float) -> None:
        """Note the error of the start."""
        self.start_error = error if math.isfinite(error) else math.inf

    @property
    def best_step(self) -> int | None:
        """Steps after which the error was lowest; None before a validation that counts.

        Where there is no start, what stands before the first step is chance and does not count.
        """
        finite = {step: error for step, error in self.errors.items() if math.isfinite(error)}
        if self.start_error is None:
            finite.pop(0, None)
        return min(finite, key=lambda step: (finite[step], step)) if finite else None

    @property
    def is_exhausted(self) -> bool:
        """Whether patience has run out: too many validations since the best one."""
        steps = list(self.errors)
        best = self.best_step
        since = len(steps) - 1 if best is None else len(steps) - 1 - steps.index(best)
        return since >= self.patience

    def as_json(self) -> dict[str, object]:
        """Return plain values for a checkpoint; `of_json` undoes it."""
        errors = {str(step): None if e == math.inf else e for step, e in self.errors.items()}
        is_infinite = self.start_error == math.inf
        return {"start_error": "infinite" if is_infinite else self.start_error, "errors": errors}

    @classmethod
    def of_json(cls, values: dict[str, object], *, patience: int) -> Guard:
        """Go on with what a checkpoint remembers."""
        errors = values["errors"]
        assert isinstance(errors, dict)
        start_error = values["start_error"]
        if start_error == "infinite":
            start_error = math.inf
        assert start_error is None or isinstance(start_error, float)
        found = {int(step): math.inf if e is None else e for step, e in errors.items()}
        return cls(patience=patience, start_error=start_error, errors=found)
