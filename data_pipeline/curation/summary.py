"""The table of series in numbers: what came in, what stayed, what was dropped and why.

Read in one pass with bounded memory: counts per source, histograms, and a few examples.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.curation.table import MEASURES, read_batches

EXAMPLES_PER_REASON = 12
EXAMPLES_KEPT = 60
"""The first of every data set comes before the second of any."""

_LENGTH_EDGES = np.round(np.logspace(0, 9, 37))
_SHARE_EDGES = np.linspace(0.0, 1.0, 41)
_ADF_EDGES = np.linspace(-60.0, 10.0, 36)


@dataclass(kw_only=True)
class Count:
    """Series and their points; a series that never became a record has none."""

    series: int = 0
    points: int = 0


@dataclass(kw_only=True)
class SourceSummary:
    """One data set: what came in, what stayed."""

    source: str
    domains: list[str] = field(default_factory=list)
    freqs: list[str] = field(default_factory=list)
    seen: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    drops: dict[str, Count] = field(default_factory=dict)
    """By reason."""
    missing_fraction: float | None = None
    """Share of the points of the kept series."""
    adf: float | None = None
    """Mean over the kept series that have one, weighted by length, as in UTSD's `source.csv`."""
    forecastability: float | None = None
    """The same mean. As UTSD's script does, it leaves out series without an ADF statistic, unless
    none has one."""


@dataclass(kw_only=True, eq=False)
class Histogram:
    """How many series, kept and dropped, lie between two edges."""

    edges: np.ndarray
    """Increasing; what lies beyond the outer ones counts into the outer bins."""
    kept: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One series with its picture."""

    item_id: str
    source: str
    reason: str | None
    copy_of: str | None
    length: int
    measures: dict[str, float | None]
    thumbnail: np.ndarray


@dataclass(kw_only=True)
class CurationSummary:
    """Everything the report shows."""

    sources: list[SourceSummary]
    """In the order of their names."""
    reasons: dict[str, Count]
    """In the order of their names."""
    domains: dict[str, Count]
    """Of the kept series, the largest first."""
    histograms: dict[str, Histogram]
    """Of length, missing_fraction, adf and forecastability."""
    examples: list[Example]
    """Kept ones first, then by reason."""

    @property
    def seen(self) -> Count:
        return _total(source.seen for source in self.sources)

    @property
    def kept(self) -> Count:
        return _total(source.kept for source in self.sources)

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Return all but the examples as plain values."""
        return {
            "seen": vars(self.seen),
            "kept": vars(self.kept),
            "reasons": {name: vars(count) for name, count in self.reasons.items()},
            "domains": {name: vars(count) for name, count in self.domains.items()},
            "sources": [
                {
                    **vars(source),
                    "seen": vars(source.seen),
                    "kept": vars(source.kept),
                    "drops": {name: vars(count) for name, count in source.drops.items()},
                }
                for source in self.sources
            ],
            "histograms": {
                name: {part: array.tolist() for part, array in vars(histogram).items()}
                for name, histogram in self.histograms.items()
            },
        }


def summarise(table: "str | os.PathLike[str] | pa.NativeFile") -> CurationSummary:
    """Read a table of series and add it up.

    Raises:
        DataError: if the table cannot be read.
    """
    sums = _Sums()
    for batch in read_batches(table):
        sums.add(batch)
    return sums.summary()


class _Sums:
    """What is added up, batch by batch."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str | None], Count] = defaultdict(Count)
        self._domain_counts: dict[str, Count] = defaultdict(Count)
        self._domains: dict[str, dict[str, None]] = defaultdict(dict)
        self._freqs: dict[str, dict[str, None]] = defaultdict(dict)
        self._weighted: dict[str, list[float]] = defaultdict(lambda: [0.0] * 7)
        self._pictured: Counter[tuple[str, str | None]] = Counter()
        self._histograms = {
            name: Histogram(
                edges=edges,
                kept=np.zeros(len(edges) - 1, np.int64),
                dropped=np.zeros(len(edges) - 1, np.int64),
            )
            for name, edges in (
                ("length", _LENGTH_EDGES),
                ("missing_fraction", _SHARE_EDGES),
                ("adf", _ADF_EDGES),
                ("forecastability", _SHARE_EDGES),
            )
        }
        # By reason, then by how many of its data set came before it.
        self._examples: dict[str | None, dict[int, list[Example]]] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Add the rows of a batch."""
        columns = _Columns(batch)
        is_kept = columns.reason_ids == len(columns.reasons)
        self._count(columns)
        for name, histogram in self._histograms.items():
            for rows, counts in ((is_kept, histogram.kept), (~is_kept, histogram.dropped)):
                counts += _fall(columns.number(name)[rows], histogram.edges)
        self._weigh(columns, is_kept)
        self._exemplify(batch)

    def summary(self) -> CurationSummary:
        """Put everything in order."""
        sources = {name: SourceSummary(source=name) for name, _ in self._counts}
        reasons: dict[str, Count] = defaultdict(Count)
        for (name, reason), count in self._counts.items():
            _add(sources[name].seen, count)
            if reason is None:
                sources[name].kept = count
            else:
                sources[name].drops[reason] = count
                _add(reasons[reason], count)
        for name, source in sources.items():
            source.domains, source.freqs = list(self._domains[name]), list(self._freqs[name])
            source.drops = dict(sorted(source.drops.items()))
            self._average(source)
        examples = []
        for reason in sorted(self._examples, key=lambda reason: (reason is not None, reason)):
            by_rank = sorted(self._examples[reason].items())
            found = [example for _, examples_of_rank in by_rank for example in examples_of_rank]
            examples += sorted(found[: _most(reason)], key=lambda example: example.source)
        domains = sorted(self._domain_counts.items(), key=lambda item: -item[1].points)
        return CurationSummary(
            sources=[sources[name] for name in sorted(sources)],
            reasons=dict(sorted(reasons.items())),
            domains=dict(domains),
            histograms=self._histograms,
            examples=examples,
        )

    def _count(self, columns: "_Columns") -> None:
        """Count series and points by source and reason, and by domain; note domains and freqs."""
        num_reasons = len(columns.reasons) + 1
        kinds = columns.source_ids * num_reasons + columns.reason_ids
        for kind, count in _count_by(kinds, columns.lengths).items():
            source, reason = divmod(kind, num_reasons)
            name = columns.reasons[reason] if reason < len(columns.reasons) else None
            _add(self._counts[columns.sources[source], name], count)
        is_kept = columns.reason_ids == len(columns.reasons)
        for domain, count in _count_by(
            columns.domain_ids[is_kept], columns.lengths[is_kept]
        ).items():
            _add(self._domain_counts[columns.domains[domain]], count)
        for names, ids, of_source in (
            (columns.domains, columns.domain_ids, self._domains),
            (columns.freqs, columns.freq_ids, self._freqs),
        ):
            for kind in np.unique(columns.source_ids * (len(names) + 1) + ids).tolist():
                source, position = divmod(kind, len(names) + 1)
                if position < len(names):
                    of_source[columns.sources[source]][names[position]] = None

    def _weigh(self, columns: "_Columns", is_kept: np.ndarray) -> None:
        """Add up what the length-weighted means of each source need."""
        missing, adf, forecastability = (
            columns.number(name) for name in ("missing_fraction", "adf", "forecastability")
        )
        has_adf, has_forecastability = ~np.isnan(adf), ~np.isnan(forecastability)
        has_both = has_adf & has_forecastability
        ones = np.ones(len(adf))
        parts = (
            (is_kept, missing),
            (is_kept & has_adf, adf),
            (is_kept & has_adf, ones),
            (is_kept & has_both, forecastability),
            (is_kept & has_both, ones),
            (is_kept & has_forecastability, forecastability),
            (is_kept & has_forecastability, ones),
        )
        for position, (rows, numbers) in enumerate(parts):
            weights = (columns.lengths * numbers)[rows]
            sums = np.bincount(columns.source_ids[rows], weights, len(columns.sources))
            for name, value in zip(columns.sources, sums.tolist(), strict=True):
                self._weighted[name][position] += value

    def _average(self, source: SourceSummary) -> None:
        missing, adf, adf_points, both, both_points, alone, alone_points = self._weighted[
            source.source
        ]
        source.missing_fraction = _ratio(missing, source.kept.points)
        source.adf = _ratio(adf, adf_points)
        source.forecastability = (
            _ratio(both, both_points) if both_points else _ratio(alone, alone_points)
        )

    def _exemplify(self, batch: pa.RecordBatch) -> None:
        pictured = batch.filter(pc.is_valid(batch["thumbnail"]))
        for row in pictured.to_pylist():
            kind = row["source"], row["reason"]
            by_rank = self._examples.setdefault(row["reason"], {})
            found = by_rank.setdefault(self._pictured[kind], [])
            self._pictured[kind] += 1
            if len(found) < _most(row["reason"]):
                found.append(
                    Example(
                        item_id=row["item_id"],
                        source=row["source"],
                        reason=row["reason"],
                        copy_of=row["copy_of"],
                        length=row["length"],
                        measures={name: row[name] for name in MEASURES},
                        thumbnail=np.array(row["thumbnail"], np.float32),
                    )
                )


class _Columns:
    """The columns of a batch as numpy arrays; names as positions among the distinct ones.

    A missing name has the position after the last.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.lengths = batch["length"].fill_null(0).to_numpy()
        self.sources, self.source_ids = _encode(batch["source"])
        self.reasons, self.reason_ids = _encode(batch["reason"])
        self.domains, self.domain_ids = _encode(batch["domain"])
        self.freqs, self.freq_ids = _encode(batch["freq"])
        self._batch = batch

    def number(self, name: str) -> np.ndarray:
        """Return a column as float64, NaN where it is null."""
        return self._batch[name].cast(pa.float64()).to_numpy(zero_copy_only=False)


def _most(reason: str | None) -> int:
    return EXAMPLES_KEPT if reason is None else EXAMPLES_PER_REASON


def _encode(column: pa.Array) -> tuple[list[str], np.ndarray]:
    encoded = column.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    return names, encoded.indices.fill_null(len(names)).to_numpy().astype(np.int64)


def _count_by(kinds: np.ndarray, lengths: np.ndarray) -> dict[int, Count]:
    found, positions = np.unique(kinds, return_inverse=True)
    series = np.bincount(positions, minlength=len(found))
    points = np.zeros(len(found), np.int64)
    np.add.at(points, positions, lengths)
    return {
        kind: Count(series=num_series, points=num_points)
        for kind, num_series, num_points in zip(
            found.tolist(), series.tolist(), points.tolist(), strict=True
        )
    }


def _fall(numbers: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count numbers between edges; NaN counts nowhere, what lies outside in the outer bins."""
    inside = np.clip(numbers[~np.isnan(numbers)], edges[0], edges[-1])
    return np.histogram(inside, edges)[0]


def _add(total: Count, count: Count) -> None:
    total.series += count.series
    total.points += count.points


def _total(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        _add(total, count)
    return total


def _ratio(total: float, points: float) -> float | None:
    return total / points if points else None
