"""What the checks look at, and what earlier ones leave for later ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tsmoe.engine.protocol import Engine
from tsmoe.preflight.meeting import Meeting
from tsmoe.preflight.verdict import Place
from tsmoe.ranks import Ranks
from tsmoe.train.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class PreflightOptions:
    """What the user may choose."""

    cache: Path
    """Folder of what this node keeps of remote data."""
    timeout_seconds: float = 300.0
    """That each check may take."""
    minimum_free_gib: float = 1.0
    """Of disk, that must be left beside the checkpoints."""


@dataclass(kw_only=True)
class Scene:
    """One rank's view; checks run one after the other, in one thread."""

    config: RunConfig
    options: PreflightOptions
    meeting: Meeting
    places: dict[int, Place]
    """Of every rank that is there."""
    doing: str = ""
    """What the check is at, for the case that it hangs."""
    ranks: Ranks = field(default_factory=Ranks)
    """All ranks, once they have joined."""
    engine: Engine | None = None
    """Once it is built."""

    @property
    def rank(self) -> int:
        return self.meeting.rank

    @property
    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def node_leaders(self) -> list[int]:
        """The lowest rank of each node."""
        leaders: dict[str, int] = {}
        for rank in sorted(self.places):
            leaders.setdefault(self.places[rank].node, rank)
        return list(leaders.values())

    @property
    def wait_seconds(self) -> float:
        """That ranks may wait for one another within a check, so that it ends by itself."""
        return self.options.timeout_seconds / 3
