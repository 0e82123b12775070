"""Counting what a build keeps and drops, by source and reason."""

from collections.abc import Mapping

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.shards.manifest import MAX_EXAMPLES, ReasonDrops, SourceDrops, SourceEntry


class Tally:
    """Counts of one block, or of several that are added up in order."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceEntry] = {}
        self.drops: dict[str, ReasonDrops] = {}

    def keep(self, record: SeriesRecord, licence: str | None) -> None:
        """Count a series that stays."""
        freqs = [] if record.freq is None else [record.freq]
        self._add_source(record.source, 1, len(record.values), [record.domain], freqs, licence)

    def drop(self, drop: Drop) -> None:
        """Count a series that is left out."""
        self._add_drops(drop.reason, drop.source, 1, [drop.item_id])

    def keep_no_longer(self, drop: Drop, points: int) -> None:
        """Turn a series that was counted as kept into one that is left out."""
        entry = self.sources[drop.source]
        entry.series -= 1
        entry.points -= points
        if entry.series == 0:
            del self.sources[drop.source]
        self.drop(drop)

    def add(self, sources: Mapping[str, SourceEntry], drops: Mapping[str, ReasonDrops]) -> None:
        """Add the counts of another block."""
        for name, entry in sources.items():
            self._add_source(
                name, entry.series, entry.points, entry.domains, entry.freqs, entry.licence
            )
        for reason, of_reason in drops.items():
            for name, of_source in of_reason.sources.items():
                self._add_drops(reason, name, of_source.count, of_source.examples)

    def describe_drops(self) -> str:
        """Say in one line why nothing is left."""
        if not self.drops:
            return "the sources are empty"
        reasons = [f"{name} {drops.count}" for name, drops in sorted(self.drops.items())]
        return f"all were dropped ({', '.join(reasons)}); check `clean` and the sources"

    def _add_source(
        self,
        name: str,
        series: int,
        points: int,
        domains: list[str],
        freqs: list[str],
        licence: str | None,
    ) -> None:
        entry = self.sources.setdefault(name, SourceEntry())
        entry.series += series
        entry.points += points
        entry.domains += [domain for domain in domains if domain not in entry.domains]
        entry.freqs += [freq for freq in freqs if freq not in entry.freqs]
        known = entry.licence.split("; ") if entry.licence else []
        new = [text for text in (licence or "").split("; ") if text and text not in known]
        entry.licence = "; ".join([*known, *new]) or None

    def _add_drops(self, reason: str, source: str, count: int, examples: list[str]) -> None:
        of_reason = self.drops.setdefault(reason, ReasonDrops())
        of_source = of_reason.sources.setdefault(source, SourceDrops())
        of_reason.count += count
        of_source.count += count
        room = MAX_EXAMPLES - len(of_source.examples)
        of_source.examples += examples[:room]
