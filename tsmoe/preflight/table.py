"""A preflight as a table, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tsmoe.preflight.verdict import Verdict, count_of, spans, worst

if TYPE_CHECKING:
    from rich.table import Table

    from tsmoe.preflight.course import PreflightReport

_COLOURS = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def as_table(report: PreflightReport) -> Table:
    """Lay the rows out; long texts are folded, never cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("check", "verdict", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in report.rows:
        # Text, because names of files may look like markup.
        verdict = Text(row.verdict.value, style=_COLOURS.get(row.verdict, "dim"))
        table.add_row(Text(row.check), verdict, Text(row.found), Text(row.advice))
    return table


def summary(report: PreflightReport) -> str:
    """Say in one line how it ended."""
    counts = {
        word: sum(row.verdict is verdict for row in report.rows)
        for word, verdict in (
            ("failed", Verdict.FAIL), ("not checked", Verdict.SKIP), ("warned of", Verdict.WARN)
        )
    }  # fmt: skip
    words = [f"{count} {word}" for word, count in counts.items() if count]
    nodes = len({place.node for place in report.places.values()})
    return (
        f"preflight: {', '.join(words) or 'all is well'}; {len(report.places)} of "
        f"{count_of(report.world_size, 'rank')} on {count_of(nodes, 'node')}, "
        f"{report.seconds:.1f} s"
    )


def as_json(report: PreflightReport) -> dict[str, Any]:
    """Return all that was found, and by whom."""
    nodes: dict[str, list[int]] = {}
    for rank, place in sorted(report.places.items()):
        nodes.setdefault(place.node, []).append(rank)
    return {
        "verdict": worst(report.rows).value,
        "world_size": report.world_size,
        "nodes": {node: spans(ranks) for node, ranks in nodes.items()},
        "seconds": report.seconds,
        "rows": [asdict(row) for row in report.rows],
        "findings": report.findings,
    }
