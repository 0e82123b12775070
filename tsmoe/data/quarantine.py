"""Shards that a run goes on without: known to all ranks, and to every later start of the run.

Windows of such a shard keep their place in the order, and nothing in them was observed, so that all
other windows are the same as ever, on any number of ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import ShardError
from data_pipeline.shards.reader import Corpus
from tsmoe.checkpoint.layout import write_text
from tsmoe.errors import CheckpointError, DataError
from tsmoe.ranks import Ranks

logger = logging.getLogger(__name__)

MAX_LOST_SHARE = 0.1
"""Of all points of the corpus; with more lost, it is not the corpus that was asked for."""


class Quarantine:
    """The lost shards of a run's corpus. What all ranks must call is marked as collective."""

    def __init__(self, corpus: Corpus, path: Path, ranks: Ranks) -> None:
        """Take up the shards that an earlier start of the run has listed in `path`. Collective."""
        self._corpus, self._path, self._ranks = corpus, path, ranks
        self._entries: dict[int, dict[str, Any]] = {}
        for entry in ranks.on_first(self._read):
            self._entries[entry["shard"]] = entry
        if self._entries:
            self._lose(self._entries)
            if ranks.is_first:
                logger.warning(
                    "%s: going on without %d shards that are listed there, %.1f %% of all points; "
                    "once they are whole again, remove that file to use them",
                    path, len(self._entries), 100 * self.lost_share,
                )  # fmt: skip

    @property
    def lost_share(self) -> float:
        """Part of the points of the corpus that is lost."""
        shards = self._corpus.manifest.shards
        return sum(shards[number].points for number in self._entries) / max(
            1, self._corpus.manifest.num_points
        )

    def add_files(self, problems: Mapping[str, str], *, step: int) -> None:
        """Add what this rank found wrong with files, and other ranks with others. Collective.

        Raises:
            DataError: if one of them is no shard, or too much is lost.
        """
        numbers = {shard.file: n for n, shard in enumerate(self._corpus.manifest.shards)}
        if others := [problems[name] for name in problems if name not in numbers]:
            raise DataError(others[0])
        self._add({numbers[name]: problems[name] for name in problems}, step=step)

    def agree(self, error: ShardError | None, *, step: int) -> bool:
        """Say whether a rank has met a bad shard, and add it on all of them. Collective.

        Args:
            error: what this rank has met, if anything.
            step: from which on the shard is lost.

        Raises:
            DataError: if too much is lost.
        """
        met = torch.tensor([float(error is not None)], device=self._ranks.device)
        if not self._ranks.sum(met).item():
            return False
        self._add({} if error is None else {error.shard: str(error)}, step=step)
        return True

    def _add(self, found: Mapping[int, str], *, step: int) -> None:
        reasons: dict[int, str] = {}
        for of_rank in self._ranks.gather(dict(found)):
            reasons = of_rank | reasons
        new = sorted(reasons.keys() - self._entries.keys())
        if not new:
            return
        for number in new:
            shard = self._corpus.manifest.shards[number]
            self._entries[number] = {
                "shard": number, "file": shard.file, "points": shard.points,
                "step": step, "reason": reasons[number],
            }  # fmt: skip
        self._lose(new)
        if self._ranks.is_first:
            for number in new:
                logger.warning("shard %d goes into quarantine: %s", number, reasons[number])
            self._write()

    def _lose(self, shards: Any) -> None:
        if self.lost_share > MAX_LOST_SHARE:
            reasons = "; ".join(entry["reason"] for entry in list(self._entries.values())[:3])
            raise DataError(
                f"{self._corpus.path}: {len(self._entries)} shards with {self.lost_share:.0%} of "
                f"all points are lost, more than {MAX_LOST_SHARE:.0%}: {reasons}; build or copy "
                "the corpus again"
            )
        self._corpus.lose(shards)

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
            is_same = values["corpus_fingerprint"] == self._corpus.fingerprint
            entries: list[dict[str, Any]] = values["shards"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._path}: cannot be read ({error}); remove it to look at all shards anew"
            ) from error
        return entries if is_same else []

    def _write(self) -> None:
        values = {
            "corpus": str(self._corpus.path),
            "corpus_fingerprint": self._corpus.fingerprint,
            "lost_share": self.lost_share,
            "shards": [self._entries[number] for number in sorted(self._entries)],
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, f"{json.dumps(values, indent=1)}\n")
        except (OSError, CheckpointError) as error:
            logger.warning("the shards in quarantine could not be listed: %s", error)
