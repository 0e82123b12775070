"""What a corpus holds, data set by data set."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.reader import Corpus


@dataclass(frozen=True, kw_only=True)
class SourceStatistics:
    """One data set in numbers."""

    source: str
    domains: tuple[str, ...]
    freqs: tuple[str, ...]
    licence: str | None
    series: int
    points: int
    train_points: int
    missing_fraction: float
    """Share of all points that were not observed."""
    length_min: int
    length_median: int
    length_max: int


def source_statistics(corpus: Corpus) -> list[SourceStatistics]:
    """Describe every data set of a corpus, in the order of their names.

    Reads the small columns only, never the values.
    """
    observed_fractions = corpus.observed_fractions().astype(np.float64)
    return [
        _describe(corpus, index, name, observed_fractions)
        for index, name in enumerate(corpus.sources)
    ]


def _describe(
    corpus: Corpus, index: int, name: str, observed_fractions: np.ndarray
) -> SourceStatistics:
    rows = corpus.source_ids == index
    lengths = corpus.lengths[rows]
    points = int(lengths.sum())
    observed = float((observed_fractions[rows] * lengths).sum())
    entry = corpus.manifest.sources[name]
    return SourceStatistics(
        source=name,
        domains=tuple(entry.domains),
        freqs=tuple(entry.freqs),
        licence=entry.licence,
        series=int(rows.sum()),
        points=points,
        train_points=int(corpus.train_lengths[rows].sum()),
        missing_fraction=max(0.0, 1.0 - observed / points),
        length_min=int(lengths.min()),
        length_median=int(np.median(lengths)),
        length_max=int(lengths.max()),
    )
