"""`tsmoe data report`: what curation saw, as a page and in numbers."""

import argparse
import json
import sys

from tsmoe.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the sub-command."""
    parser.add_argument("path", metavar="CORPUS", help="folder or URL of the corpus")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder or URL for report.html and report.json (default: in the corpus)",
    )


def run_report(args: argparse.Namespace) -> int:
    """Write the report, and print what was dropped."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data_pipeline.curation.report import write_report
    from data_pipeline.storage.store import Store

    corpus = Store.at(args.path)
    out = None if args.out is None else Store.at(args.out)
    if out is not None and out.is_local and out.local_path("").is_file():
        raise ConfigError(f"--out {args.out} is a file; choose a folder")
    report = write_report(corpus, out)
    numbers = report.numbers
    if args.json:
        json.dump(numbers, sys.stdout, indent=2)
        sys.stdout.write("\n")
        return 0
    seen, kept = numbers["seen"], numbers["kept"]
    print(
        f"{corpus}: kept {kept['series']:,} of {seen['series']:,} series, {kept['points']:,} of "
        f"{seen['points']:,} points"
    )
    if numbers["reasons"]:
        table = Table("reason", title=Text("dropped"), title_justify="left")
        for name in ("series", "points"):
            table.add_column(name, justify="right")
        for reason, count in numbers["reasons"].items():
            table.add_row(Text(reason), f"{count['series']:,}", f"{count['points']:,}")
        Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)
    print(f"report: {report.path}")
    return 0
