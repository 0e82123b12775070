"""The overlap audit: is any window of the evaluation tables in the corpus?

Every table is cut into windows of 64 steps laid end to end, plus one over its end, and each is
looked for at every offset of every series of the corpus, at any scale, sign and level.

Guarantee: a stretch of at least 127 steps that a table shares with the corpus contains a whole
window of the table, and is found, except where
- that window is uninformative (flat, hardly turning, few values, or repeating itself): counted;
- neighbours that differ in one copy are equal in the other, as rounding can make them;
- the copy has noise added, gaps filled, or another sampling interval: it is another series.
Series of 24 to 63 steps are cut into windows of 24, so that 47 shared steps are found; shorter
ones cannot be checked and are reported as such. What hashes find is verified on the values.

W values of a window
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.progress import Progress, SilentProgress
from data_pipeline.record import SeriesBatch
from data_pipeline.shards.reader import Corpus
from data_pipeline.similarity.findings import AuditReport, Overlap, TableReport
from data_pipeline.similarity.match import LinearMap, extend_match, fit_windows, signatures
from data_pipeline.similarity.probes import Places, Probes
from data_pipeline.similarity.tables import read_variates
from data_pipeline.similarity.windows import MIN_WINDOW, WINDOW, hashed_windows

_PAIRS_AT_ONCE = 2**14
_PLACES_FOLLOWED = 64
"""Matches of one variate with one series that are followed to both sides in search of the longest
common stretch; those beyond are only counted."""


def audit(
    corpus: Corpus, tables: Sequence[Path], *, progress: Progress | None = None
) -> AuditReport:
    """Look for the windows of evaluation tables in a corpus.

    The tables are held in memory; of the corpus, one shard is mapped at a time.

    Args:
        corpus: the corpus.
        tables: files, see `tables.read_variates`.
        progress: told about every shard.

    Raises:
        DataError: if a table or a shard cannot be read.
    """
    evaluation = _Evaluation(tables)
    progress = progress or SilentProgress()
    for number in range(len(corpus.manifest.shards)):
        corpus.prefetch([number + 1] if number + 1 < len(corpus.manifest.shards) else [])
        shard = corpus.shard(number)
        evaluation.search(shard)
        progress.advance(corpus.manifest.shards[number].file, len(shard.values), len(shard))
    return AuditReport(
        corpus=str(corpus.path),
        fingerprint=corpus.fingerprint,
        series=corpus.num_series,
        points=int(corpus.lengths.sum()),
        tables=evaluation.report(),
    )


class _Evaluation:
    """The evaluation tables, and what was found of them so far."""

    def __init__(self, tables: Sequence[Path]) -> None:
        self.tables = [str(table) for table in tables]
        self.names: list[str] = []
        self.table_of: list[int] = []
        parts: list[np.ndarray] = [np.empty(0, np.float32)]
        for number, table in enumerate(tables):
            for variate in read_variates(table):
                self.names.append(variate.name)
                self.table_of.append(number)
                parts.append(variate.values)
        lengths = np.array([len(part) for part in parts])
        self.ends = np.cumsum(lengths).tolist()
        self.lengths = lengths[1:]
        self.values = np.concatenate(parts)
        del parts  # the tables are in memory once
        long = np.flatnonzero(self.lengths >= WINDOW).tolist()
        short = np.flatnonzero((self.lengths >= MIN_WINDOW) & (self.lengths < WINDOW)).tolist()
        self.probes = [
            Probes(self.values, self.ends, chosen, window)
            for chosen, window in ((long, WINDOW), (short, MIN_WINDOW))
        ]
        self.found = [np.zeros(len(probes), np.bool_) for probes in self.probes]
        self.reports = [TableReport(table=table) for table in self.tables]

    def variate(self, number: int) -> np.ndarray:
        return self.values[self.ends[number] : self.ends[number + 1]]

    def search(self, shard: SeriesBatch) -> None:
        """Look at every offset of a shard."""
        for probes, found in zip(self.probes, self.found, strict=True):
            if not len(probes):
                continue
            stretches: dict[tuple[int, int], _Stretches] = {}
            for own, rows, places in _candidates(shard, probes):
                self._verify(shard, probes, found, stretches, own, rows, places)
            for (variate, row), stretch in stretches.items():
                self._enter(shard, variate, row, stretch)

    def report(self) -> list[TableReport]:
        """Add the counts to what was found."""
        for probes, found in zip(self.probes, self.found, strict=True):
            for number, report in enumerate(self.reports):
                here = np.array(self.table_of) == number
                report.windows += int(probes.counts.windows[here].sum())
                report.uninformative += int(probes.counts.uninformative[here].sum())
                report.found += int(here[probes.variates[found]].sum())
        checked = np.zeros(len(self.lengths), np.int64)
        for probes in self.probes:
            checked += probes.counts.windows - probes.counts.uninformative
        for variate, number in enumerate(self.table_of):
            report = self.reports[number]
            report.variates += 1
            if self.lengths[variate] < MIN_WINDOW:
                report.too_short += 1
            elif checked[variate] == 0:
                report.unchecked += 1
        for report in self.reports:
            report.trim()
        return self.reports

    def _verify(
        self,
        shard: SeriesBatch,
        probes: Probes,
        found: np.ndarray,
        stretches: "dict[tuple[int, int], _Stretches]",
        own: Places,
        rows: Places,
        places: Places,
    ) -> None:
        """Compare the values of pairs of windows, and follow those that match."""
        windows = np.lib.stride_tricks.sliding_window_view(shard.values, probes.window)
        fits = fit_windows(probes.values_of(own), windows[places])
        for pair in np.flatnonzero(fits.agrees_B):
            probe, row = int(own[pair]), int(rows[pair])
            found[probe] = True
            variate = int(probes.variates[probe])
            stretch = stretches.setdefault((variate, row), _Stretches())
            stretch.add(
                self.variate(variate),
                shard.series(row),
                probe=probe,
                at=(
                    int(probes.places[probe]) - self.ends[variate],
                    int(places[pair] - shard.offsets[row]),
                ),
                window=probes.window,
                fit=fits[int(pair)],
            )

    def _enter(self, shard: SeriesBatch, variate: int, row: int, stretch: "_Stretches") -> None:
        record = shard.record(row)
        first, second = stretch.begin
        self.reports[self.table_of[variate]].add(
            Overlap(
                table=self.tables[self.table_of[variate]],
                variate=self.names[variate],
                row=first + 1,
                steps=stretch.steps,
                item_id=record.item_id,
                source=record.source,
                corpus_variate=record.variate,
                position=second + 1,
                scale=stretch.fit.scale,
                shift=stretch.fit.shift,
                windows=len(stretch.probes),
            )
        )


class _Stretches:
    """What a variate and a series have in common: their windows, and the longest stretch."""

    def __init__(self) -> None:
        self.probes: set[int] = set()
        self.steps = 0
        self.begin = (0, 0)
        self.fit = LinearMap(scale=1.0, shift=0.0, loc=0.0, spread=0.0)
        self._followed = 0
        self._end_by_lag: dict[int, int] = {}

    def add(
        self,
        variate: np.ndarray,
        series: np.ndarray,
        *,
        probe: int,
        at: tuple[int, int],
        window: int,
        fit: LinearMap,
    ) -> None:
        """Take a matching window; follow it unless it lies in a stretch that is known."""
        self.probes.add(probe)
        lag = at[1] - at[0]
        if at[0] < self._end_by_lag.get(lag, 0) or self._followed == _PLACES_FOLLOWED:
            return
        self._followed += 1
        begin, end = extend_match(variate, series, at=at, length=window, fit=fit)
        self._end_by_lag[lag] = end
        if end - begin > self.steps:
            self.steps, self.begin, self.fit = end - begin, (begin, begin + lag), fit


def _candidates(shard: SeriesBatch, probes: Probes) -> Iterator[tuple[Places, Places, Places]]:
    """Yield pairs of windows that may match: the probe, the row in the shard, the place there.

    In the order of their places, a bounded number at a time.
    """
    numbers: list[Places] = []
    places: list[Places] = []
    waiting = 0
    for piece in hashed_windows(shard.values, probes.window):
        positions, found = probes.find(piece.hashes)
        if len(positions):
            numbers.append(found)
            places.append(positions + piece.start)
            waiting += len(found)
        if waiting >= _PAIRS_AT_ONCE:
            yield from _pairs(shard, probes, np.concatenate(numbers), np.concatenate(places))
            numbers, places, waiting = [], [], 0
    if waiting:
        yield from _pairs(shard, probes, np.concatenate(numbers), np.concatenate(places))


def _pairs(
    shard: SeriesBatch, probes: Probes, numbers: Places, places: Places
) -> Iterator[tuple[Places, Places, Places]]:
    rows = np.searchsorted(shard.offsets, places, side="right") - 1
    # Windows that reach into the next series are of no series.
    inside = places + probes.window <= shard.offsets[rows + 1]
    numbers, places, rows = numbers[inside], places[inside], rows[inside]
    windows = np.lib.stride_tricks.sliding_window_view(shard.values, probes.window)
    begins, ends = probes.like(numbers, *signatures(windows[places]))
    counts = ends - begins
    total = np.cumsum(counts)
    for start in range(0, int(total[-1:].sum()), _PAIRS_AT_ONCE):
        pairs = np.arange(start, min(start + _PAIRS_AT_ONCE, total[-1]))
        of = np.searchsorted(total, pairs, side="right")
        yield begins[of] + pairs - (total[of] - counts[of]), rows[of], places[of]
