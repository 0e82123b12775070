"""Memory that is held over the course of a step, and its peak, by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = (
    "weights",
    "gradients",
    "masters",
    "moments",
    "activations",
    "dispatch_buffers",
    "reduction_buckets",
    "batch",
    "working",
)
"""Kinds of memory; `working` is what one operator or update needs while it runs."""


class Timeline:
    """Adds up what is taken and given back, and remembers the fullest moment."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._total = self._most = 0

    @property
    def peak(self) -> dict[str, int]:
        """Bytes of each part at the fullest moment so far."""
        return {part: self._peak[part] for part in PARTS}

    def take(self, part: str, size: int) -> None:
        """Hold more of a part."""
        self._held[part] += size
        self._total += size
        if self._total > self._most:
            self._most, self._peak = self._total, self._held.copy()

    def give(self, part: str, size: int) -> None:
        """Give back."""
        self._held[part] -= size
        self._total -= size

    @contextmanager
    def working(self, size: int) -> Iterator[None]:
        """Hold working memory for as long as the block runs."""
        self.take("working", size)
        yield
        self.give("working", size)
