"""The curation report of a corpus: one HTML page that needs nothing beside it, and its numbers.

What came in, what stayed, what was dropped and why, with examples that a person can judge.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pyarrow as pa

from data_pipeline.curation.pictures import (
    DROPPED_COLOUR,
    KEPT_COLOUR,
    course_drawing,
    domain_chart,
    histogram_chart,
)
from data_pipeline.curation.summary import Count, CurationSummary, Example, SourceSummary, summarise
from data_pipeline.curation.table import CURATION_FOLDER, CURATION_TABLE
from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.storage.store import Store

PAGE_FILE = "report.html"
NUMBERS_FILE = "report.json"

_LABELS = {
    "length": "points per series",
    "missing_fraction": "share of points that are missing",
    "forecastability": "forecastability: 0 is white noise",
    "adf": "ADF statistic: the lower, the more stationary",
}
_STYLE = f"""
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2em .7em; text-align: right; border-bottom: 1px solid #ddd; }}
th {{ position: sticky; top: 0; background: #fff; }}
th:first-child, td:first-child, td.text {{ text-align: left; }}
.grid {{ display: flex; flex-wrap: wrap; gap: 1em; }}
.grid img {{ width: 30em; max-width: 100%; }}
.wide {{ overflow-x: auto; }}
.example {{ width: 14em; font-size: 12px; overflow-wrap: anywhere; }}
.example svg {{ width: 100%; background: #f7f7f7; }}
.dropped {{ color: {DROPPED_COLOUR}; }}
"""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written."""

    path: str
    """The page."""
    numbers: dict[str, Any]  # Any: JSON
    """What `report.json` holds."""


def write_report(corpus: Store, out: Store | None = None) -> Report:
    """Read the manifest and the table of a corpus, and write the page and its numbers.

    Args:
        corpus: where the corpus is.
        out: where `report.html` and `report.json` go; by default beside the table.

    Raises:
        DataError: if there is no whole corpus, or it has no table of this build.
    """
    manifest = Manifest.read(corpus)
    summary = summarise(_open_table(corpus))
    if summary.kept.series != manifest.num_series:
        raise DataError(
            f"{corpus.path_of(CURATION_TABLE)}: tells of {summary.kept.series} kept series, but "
            f"the corpus has {manifest.num_series}; build the corpus again"
        )
    numbers = {
        "path": str(corpus),
        "fingerprint": manifest.fingerprint,
        "train_fraction": manifest.train_fraction,
        "thresholds": manifest.config.get("clean", {}),
        **summary.as_json(),
    }
    folder = f"{CURATION_FOLDER}/" if out is None else ""
    store = corpus if out is None else out
    store.write_bytes(f"{folder}{PAGE_FILE}", page(str(corpus), manifest, summary).encode())
    store.write_bytes(f"{folder}{NUMBERS_FILE}", json.dumps(numbers, indent=1).encode())
    return Report(path=store.path_of(f"{folder}{PAGE_FILE}"), numbers=numbers)


def _open_table(corpus: Store) -> "str | pa.NativeFile":
    if not corpus.exists(CURATION_TABLE):
        raise DataError(
            f"{corpus.path_of(CURATION_TABLE)}: there is no such file, so it is not known what was "
            f"dropped; build the corpus again with this program"
        )
    if corpus.is_local:
        return str(corpus.local_path(CURATION_TABLE))
    return pa.BufferReader(corpus.read_bytes(CURATION_TABLE))


def page(name: str, manifest: Manifest, summary: CurationSummary) -> str:
    """Lay the report out as HTML; every name from the data is escaped.

    Args:
        name: of the corpus.
        manifest: of the corpus.
        summary: of its table.
    """
    seen, kept = summary.seen, summary.kept
    parts = [
        f"<h1>Curation of {escape(name)}</h1>",
        f"<p>{kept.series:,} of {seen.series:,} series stayed, with {kept.points:,} of "
        f"{seen.points:,} points, from {len(summary.sources):,} data sets. The first "
        f"{manifest.train_fraction:.0%} of each series may be trained on. Fingerprint "
        f"<code>{manifest.fingerprint[:12]}</code>.</p>",
        "<h2>Dropped</h2>",
        _reasons_table(summary, manifest.config.get("clean", {})),
        "<h2>What came in</h2>",
        '<div class="grid">',
        *(
            _image(
                histogram_chart(histogram, _LABELS[key], is_logarithmic=key == "length"),
                f"histogram of {_LABELS[key]}",
            )
            for key, histogram in summary.histograms.items()
        ),
        _image(domain_chart(summary.domains), "points by domain") if summary.domains else "",
        "</div>",
        "<h2>Data sets</h2>",
        _sources_table(summary.sources, manifest),
        "<h2>Examples of what stayed</h2>",
        _examples(example for example in summary.examples if example.reason is None),
        "<h2>Examples of what was dropped</h2>",
        *(
            f'<h3 class="dropped">{escape(reason)}</h3>'
            + _examples(example for example in summary.examples if example.reason == reason)
            for reason in summary.reasons
        ),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">'
        f"<title>Curation of {escape(name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _reasons_table(summary: CurationSummary, thresholds: Mapping[str, object]) -> str:
    rows: list[Sequence[str]] = [
        (reason, *_counts(count, summary.seen)) for reason, count in summary.reasons.items()
    ]
    dropped = Count(
        series=summary.seen.series - summary.kept.series,
        points=summary.seen.points - summary.kept.points,
    )
    rows.append(("all", *_counts(dropped, summary.seen)))
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in thresholds.items())
    return _table(("reason", "series", "share", "points", "share"), rows) + (
        f"<p>Thresholds: <code>{escape(settings)}</code></p>" if settings else ""
    )


def _counts(count: Count, of: Count) -> tuple[str, ...]:
    return (
        f"{count.series:,}",
        f"{count.series / max(1, of.series):.2%}",
        f"{count.points:,}",
        f"{count.points / max(1, of.points):.2%}",
    )


def _sources_table(sources: Sequence[SourceSummary], manifest: Manifest) -> str:
    header = (
        "data set",
        "domain",
        "freq",
        "series in",
        "kept",
        "points in",
        "kept",
        "missing",
        "ADF",
        "forecastability",
        "dropped",
        "licence",
    )
    rows = []
    for source in sources:
        entry = manifest.sources.get(source.source)
        drops = ", ".join(f"{reason} {count.series:,}" for reason, count in source.drops.items())
        rows.append(
            (
                source.source,
                ", ".join(source.domains),
                ", ".join(source.freqs) or "-",
                f"{source.seen.series:,}",
                f"{source.kept.series:,}",
                f"{source.seen.points:,}",
                f"{source.kept.points:,}",
                _number(source.missing_fraction, ".1%"),
                _number(source.adf, ".3f"),
                _number(source.forecastability, ".3f"),
                drops or "-",
                (entry.licence if entry is not None else None) or "-",
            )
        )
    return (
        "<p>Missing, ADF and forecastability are means over the kept series, weighted by length; "
        "ADF and forecastability are defined as in UTSD's <code>source.csv</code>.</p>"
    ) + _table(header, rows)


def _examples(examples: Iterable[Example]) -> str:
    cards = [_example(example) for example in examples]
    return f'<div class="grid">{"".join(cards)}</div>' if cards else "<p>No picture.</p>"


def _example(example: Example) -> str:
    colour = KEPT_COLOUR if example.reason is None else DROPPED_COLOUR
    numbers = ", ".join(
        f"{name.removesuffix('_fraction').replace('_', ' ')} {_number(value, '.3g')}"
        for name, value in example.measures.items()
        if value is not None
    )
    copy = f"<br>copy of {escape(example.copy_of)}" if example.copy_of else ""
    return (
        f'<div class="example">{course_drawing(example.thumbnail, colour)}'
        f"<b>{escape(example.item_id)}</b><br>{escape(example.source)}, "
        f"{example.length:,} points{copy}<br>{numbers}</div>"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>"


def _image(url: str, text: str) -> str:
    return f'<img src="{url}" alt="{escape(text)}">'


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)
