"""`tsmoe data audit`: is anything of the evaluation tables in a corpus?"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsmoe.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.similarity.findings import AuditReport

_OVERLAPS_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("path", metavar="CORPUS", help="folder or URL of the corpus")
    parser.add_argument(
        "--against",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="evaluation tables: wide, long, or one series or case per row; CSV or Parquet",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="OUT",
        help="write all that was found; - or nothing is standard output",
    )


def run_audit(args: argparse.Namespace) -> int:
    """Look for every window of the tables; exit code 3 if one is in the corpus."""
    from data_pipeline.progress import command_progress
    from data_pipeline.shards import Corpus
    from data_pipeline.similarity.audit import audit
    from tsmoe.evaluate.report import check_output, replace_file

    if args.json not in (None, "-"):
        check_output("--json", args.json, (".json",))
    corpus = Corpus.open(args.path)
    with command_progress() as progress:
        report = audit(corpus, [Path(file) for file in args.against], progress=progress)
    text = json.dumps(report.as_json(), indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        _print_report(report)
    if args.json not in (None, "-"):
        with replace_file(args.json) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return 0 if report.is_clean else DataError.exit_code


def _print_report(report: "AuditReport") -> None:
    overlaps = [item for table in report.tables for item in table.overlaps]
    num_overlaps = sum(table.num_overlaps for table in report.tables)
    _print_table(
        f"{report.corpus}: {report.series:,} series, {report.points:,} points",
        ("table", "variates", "too short", "nothing to tell", "windows", "not checked", "found"),
        [
            (
                table.table,
                *(
                    f"{count:,}"
                    for count in (
                        table.variates,
                        table.too_short,
                        table.unchecked,
                        table.windows,
                        table.uninformative,
                        table.found,
                    )
                ),
            )
            for table in report.tables
        ],
    )
    if overlaps:
        overlaps.sort(key=lambda item: -item.steps)
        more = f", the longest {_OVERLAPS_SHOWN} of them" if num_overlaps > _OVERLAPS_SHOWN else ""
        _print_table(
            f"{num_overlaps:,} pairs of a variate and a series have windows in common{more}",
            ("table", "variate", "from row", "steps", "series", "source", "from step", "is"),
            [
                (
                    item.table,
                    item.variate,
                    f"{item.row:,}",
                    f"{item.steps:,}",
                    item.item_id,
                    item.source,
                    f"{item.position:,}",
                    f"{item.scale:.6g} * table {item.shift:+.6g}",
                )
                for item in overlaps[:_OVERLAPS_SHOWN]
            ],
        )
    checked = sum(table.windows - table.uninformative for table in report.tables)
    found = sum(table.found for table in report.tables)
    if report.is_clean:
        print(f"none of {checked:,} windows is in the corpus, at any scale, level and place")
    else:
        print(f"{found:,} of {checked:,} windows are in the corpus; leave those series out of it")


def _print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for name in header:
        is_number = name not in ("table", "variate", "series", "source", "is")
        table.add_column(name, justify="right" if is_number else "left")
    for row in rows:
        # Text, because names from the data may look like markup.
        table.add_row(*(Text(cell) for cell in row))
    # A pipe has no width of its own; a narrow guess would cut the cells.
    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(table)
