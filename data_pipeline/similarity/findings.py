"""What an overlap audit found, table by table."""

import heapq
from dataclasses import asdict, dataclass, field
from typing import Any

OVERLAPS_KEPT = 1000
"""Per table, those with the longest common stretch; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """A variate of a table and a series of the corpus that have windows in common."""

    table: str
    variate: str
    row: int
    """Step of the variate where the longest common stretch begins, from 1; in a wide table this
    is its row."""
    steps: int
    """Length of that stretch."""
    item_id: str
    source: str
    corpus_variate: int
    """Which variate of the recording `item_id` it is."""
    position: int
    """Step of the series in the corpus where the stretch begins, from 1."""
    scale: float
    shift: float
    """Corpus = scale * table + shift."""
    windows: int
    """Windows of the variate that are somewhere in the series."""


@dataclass(kw_only=True)
class TableReport:
    """What became of the windows of one table."""

    table: str
    variates: int = 0
    windows: int = 0
    uninformative: int = 0
    """Windows that could not be told from others and were not looked for."""
    found: int = 0
    """Windows that are in the corpus."""
    too_short: int = 0
    """Variates that are shorter than the shortest window: not checked."""
    unchecked: int = 0
    """Variates all of whose windows are uninformative: not checked either."""
    num_overlaps: int = 0
    """Pairs of a variate and a series with windows in common."""
    overlaps: list[Overlap] = field(default_factory=list)

    def add(self, overlap: Overlap) -> None:
        """Enter an overlap; of very many only the longest are kept."""
        self.num_overlaps += 1
        self.overlaps.append(overlap)
        if len(self.overlaps) > 2 * OVERLAPS_KEPT:
            self.trim()

    def trim(self) -> None:
        """Sort by length, the longest first, and keep no more than `OVERLAPS_KEPT`."""
        self.overlaps = heapq.nlargest(
            OVERLAPS_KEPT, self.overlaps, key=lambda overlap: overlap.steps
        )


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The outcome of an overlap audit."""

    corpus: str
    fingerprint: str
    series: int
    points: int
    """Points of the corpus, all of which were looked at."""
    tables: list[TableReport]

    @property
    def is_clean(self) -> bool:
        """Whether nothing that could be checked is in the corpus."""
        return not any(table.found for table in self.tables)

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Return the report as plain JSON values."""
        return {"clean": self.is_clean, **asdict(self)}
