"""Read the newest lines of a metrics file that may have millions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

STEPS_READ = 20
"""Newest steps that speed is judged by."""
# Bytes read at a time, from the end; and at most, however rare validation may be.
_BLOCK, _AT_MOST = 1 << 18, 1 << 24


@dataclass(kw_only=True)
class MetricsTail:
    """What the newest lines say."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    """Lines of training steps, newest first, `STEPS_READ` at most."""
    validation: dict[str, Any] | None = None
    """The newest line with a validation loss, if it is not too far back."""

    @property
    def done(self) -> int:
        """Steps that were recorded."""
        return int(self.steps[0]["step"]) + 1 if self.steps else 0

    @property
    def loss(self) -> float | None:
        """Of the newest step."""
        return number(self.steps[0].get("loss/train")) if self.steps else None

    @property
    def step_seconds(self) -> list[float]:
        """Of the newest steps; the first of a start, which is no measure, only if there is none."""
        return self._steady("speed/step_seconds")

    @property
    def points_per_second(self) -> float | None:
        """Median over the newest steps."""
        values = self._steady("speed/points_per_second")
        return median(values) if values else None

    @property
    def ranks(self) -> int | None:
        """How many wrote the newest list by rank; None if there is none in these lines."""
        for line in self.steps:
            started = line.get("speed/start")
            if isinstance(started, dict) and isinstance(started.get("ranks"), int):
                return int(started["ranks"])
            if by_rank := line.get("speed/of_step_before", {}).get("compute_seconds"):
                return len(by_rank)
        return None

    def _steady(self, name: str) -> list[float]:
        firsts = [line for line in self.steps if "speed/start" in line]
        lines = [line for line in self.steps if line not in firsts] or firsts
        values = (number(line.get(name)) for line in lines)
        return [value for value in values if value is not None]


def read_tail(path: Path) -> MetricsTail:
    """Read a metrics file from its end until enough is known; one that is missing is empty."""
    tail = MetricsTail()
    try:
        for text in _lines_from_the_end(path):
            _add(tail, text)
            if len(tail.steps) == STEPS_READ and tail.validation is not None:
                break
    except FileNotFoundError:
        pass
    return tail


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, (int, float)) and abs(value) < float("inf"):
        return float(value)
    return None


def _add(tail: MetricsTail, text: bytes) -> None:
    is_step = b'"loss/train"' in text
    if not text or (is_step and len(tail.steps) == STEPS_READ):
        return  # not decoded: lines of many experts are long
    try:
        line = json.loads(text)
        int(line["step"])
    except (ValueError, KeyError, TypeError):
        return  # just being written, cut short by a kill, or of another kind
    if is_step:
        tail.steps.append(line)
    elif tail.validation is None and "loss/validation" in line:
        tail.validation = line


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """Yield lines, the last first; what follows the last line break is still being written."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        least = max(0, end - _AT_MOST)
        pieces: list[bytes] = []  # of a line whose beginning was not read yet, last piece first
        while end > least:
            begin = max(least, end - _BLOCK)
            file.seek(begin)
            first, *lines = file.read(end - begin).split(b"\n")
            end = begin
            if lines:
                yield lines.pop() + b"".join(reversed(pieces))
                yield from reversed(lines)
                pieces = []
            pieces.append(first)
        if least == 0:
            yield b"".join(reversed(pieces))
