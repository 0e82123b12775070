"""The overlap audit: how fast it reads, what it finds in a corpus, and whether it finds copies.

First the corpus as it is, with its speed beside that of a plain pass over the same values. Then
stretches of the tables, changed in several ways and hidden in random walks, make a small corpus in
which each should be found that holds a window to check, or is like another part of its variate;
noise and resampling make other series, which is out of its reach.
Run: python benchmarks/audit.py CORPUS --against FILE|FOLDER...
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.build import build_corpus
from data_pipeline.config import CorpusConfig
from data_pipeline.shards import Corpus
from data_pipeline.similarity.audit import audit
from data_pipeline.similarity.duplicates import DuplicatesConfig
from data_pipeline.similarity.probes import Probes
from data_pipeline.similarity.tables import Variate, read_variates
from data_pipeline.similarity.windows import WINDOW
from data_pipeline.sources import ParquetSource
from data_pipeline.steps.clean import CleanConfig
from record import record

_PER_CHANGE = 300
_STEPS = (127, 600)
_HOST_STEPS = 400


def _standardised(values: np.ndarray) -> np.ndarray:
    return (values - np.nanmean(values)) / max(float(np.nanstd(values)), 1e-9)


# What is done to a stretch, given a generator; float64 in and out.
CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as it is": lambda x, _: x,
    "scaled": lambda x, rng: x * 10 ** rng.uniform(-3, 3),
    "negated": lambda x, rng: -x * 10 ** rng.uniform(-1, 1),
    "moved by ten standard deviations": lambda x, _: x + 10 * np.nanstd(x),
    "standardised": lambda x, _: _standardised(x),
    "standardised, rounded to 6 places": lambda x, _: np.round(_standardised(x), 6),
    "standardised, rounded to 3 places": lambda x, _: np.round(_standardised(x), 3),
    "noise of 1 % (out of reach)": lambda x, rng: x + 0.01 * np.nanstd(x) * rng.normal(size=len(x)),
    "means of two steps (out of reach)": lambda x, _: x[: len(x) // 2 * 2].reshape(-1, 2).mean(1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("--against", nargs="+", required=True, type=Path)
    args = parser.parse_args()
    corpus = Corpus.open(args.corpus)
    tables = [
        file
        for path in args.against
        for file in (sorted(path.rglob("*.parquet")) if path.is_dir() else [path])
    ]
    results = {"corpus": audit_corpus(corpus, tables), "planted": plant(tables)}
    record("audit", results, notes="One process, one thread.")


def audit_corpus(corpus: Corpus, tables: list[Path]) -> dict[str, Any]:
    """Audit, three times; the best of each time counts, as others may use the machine."""
    whole, read, plain = [], [], []
    for _ in range(3):
        begun = time.process_time()
        report = audit(corpus, tables)
        whole.append(time.process_time() - begun)
        begun = time.process_time()
        for table in tables:
            for _variate in read_variates(table):
                pass
        read.append(time.process_time() - begun)
        begun = time.process_time()
        for number in range(len(corpus.manifest.shards)):
            np.nansum(corpus.shard(number).values)
        plain.append(time.process_time() - begun)
    windows = sum(table.windows for table in report.tables)
    return {
        "points": report.points,
        "series": report.series,
        "tables": len(tables),
        "variates": sum(table.variates for table in report.tables),
        "windows": windows,
        "windows_not_checked": sum(table.uninformative for table in report.tables),
        "windows_found": sum(table.found for table in report.tables),
        "variates_too_short": sum(table.too_short for table in report.tables),
        "cpu_seconds": round(min(whole), 2),
        "cpu_seconds_to_read_the_tables": round(min(read), 2),
        "points_per_cpu_second": round(report.points / min(whole)),
        "points_per_cpu_second_of_a_plain_sum": round(report.points / min(plain)),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def plant(tables: list[Path]) -> dict[str, Any]:
    """Hide changed stretches in a corpus, and count how many of them the audit finds."""
    rng = np.random.default_rng(0)
    # Tables first, then variates: most variates are of two tables and say nothing.
    by_table = [
        [item for item in read_variates(table) if len(item.values) >= _STEPS[1]] for table in tables
    ]
    by_table = [variates for variates in by_table if variates]
    rows: dict[str, list[Any]] = {"item_id": [], "target": []}
    expected: dict[str, tuple[str, Variate, int, bool]] = {}
    for change, function in CHANGES.items():
        for number in range(_PER_CHANGE):
            variates = by_table[rng.integers(len(by_table))]
            variate = variates[rng.integers(len(variates))]
            steps = int(rng.integers(*_STEPS))
            start = int(rng.integers(len(variate.values) - steps + 1))
            stretch = variate.values[start : start + steps].astype(np.float64)
            host = rng.normal(size=_HOST_STEPS).cumsum()
            place = int(rng.integers(_HOST_STEPS))
            name = f"{change} {number}"
            rows["item_id"].append(name)
            changed = function(stretch, rng)
            rows["target"].append(
                np.concatenate([host[:place], changed, host[place:]]).astype(np.float32)
            )
            expected[name] = (change, variate, start, _tells(variate, start, steps))
    with tempfile.TemporaryDirectory() as folder:
        table = pa.table(
            {"item_id": rows["item_id"], "target": pa.array(rows["target"], pa.list_(pa.float32()))}
        )
        pq.write_table(table, Path(folder) / "planted.parquet")
        build_corpus(_keep_all(Path(folder) / "planted.parquet"), Path(folder) / "corpus")
        report = audit(Corpus.open(Path(folder) / "corpus"), tables)
    found = {
        (item.item_id, item.table, item.variate)
        for report_of_table in report.tables
        for item in report_of_table.overlaps
    }
    counts = {change: {"planted": 0, "with_a_window_to_check": 0, "found": 0} for change in CHANGES}
    for name, (change, variate, _, tells) in expected.items():
        counts[change]["planted"] += 1
        counts[change]["with_a_window_to_check"] += tells
        counts[change]["found"] += (name, variate.table, variate.name) in found
    return counts


def _tells(variate: Variate, start: int, steps: int) -> bool:
    """Whether a window of the variate lies in the stretch and is one that the audit looks for."""
    probes = Probes(variate.values, [0, len(variate.values)], [0], WINDOW)
    return bool(((probes.places >= start) & (probes.places + WINDOW <= start + steps)).any())


def _keep_all(path: Path) -> CorpusConfig:
    return CorpusConfig(
        sources=[ParquetSource(path=str(path))],
        clean=CleanConfig(
            max_missing_fraction=1.0,
            max_gap_fraction=None,
            drops_constant=False,
            max_constant_fraction=None,
            max_clipped_fraction=None,
            max_spike_fraction=None,
        ),
        duplicates=DuplicatesConfig(exact=False, similar=False),
    )


if __name__ == "__main__":
    main()
