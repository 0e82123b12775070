"""Temporary: exact copies only."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ConfigDict


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig:
    __pydantic_config__ = ConfigDict(extra="forbid")
    exact: bool = True


@dataclass(frozen=True)
class Copy:
    block: int
    row: int
    kept_block: int
    kept_row: int
    reason: str


class SketchWriter:
    def __init__(self, config: DuplicatesConfig) -> None:
        self._digests: list[bytes] = []

    def add(self, values: np.ndarray) -> None:
        self._digests.append(hashlib.sha1(np.ascontiguousarray(values).data).digest())

    def write(self, path: Path) -> None:
        np.save(path, np.frombuffer(b"".join(self._digests), "S20"))


def find_duplicates(
    sketches: Sequence[Path], values_of: Callable[[int, int], np.ndarray], config: DuplicatesConfig
) -> Iterator[Copy]:
    seen: dict[bytes, tuple[int, int]] = {}
    for block, path in enumerate(sketches):
        for row, digest in enumerate(np.load(path).tolist()):
            kept = seen.setdefault(digest, (block, row))
            if kept != (block, row) and config.exact:
                yield Copy(block, row, *kept, "duplicate")
