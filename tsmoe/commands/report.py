"""`tsmoe report`: how a run went, as a page with pictures and in numbers."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    report = subparsers.add_parser(
        "report",
        help="show how a run went: loss, experts, speed, communication, stragglers",
        description="Write a page with pictures of what a run recorded. The run may still be "
        "going on; nothing of it is touched.",
    )
    report.add_argument("folder", metavar="RUN", help="folder of the run")
    report.add_argument("--out", metavar="DIR", help="folder for the report (default: RUN/report)")
    report.add_argument("--json", action="store_true", help="print the numbers")
    report.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from tsmoe.errors import ConfigError
    from tsmoe.report import write_report
    from tsmoe.report.page import headline

    out = None if args.out is None else Path(args.out)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {args.out} is a file; choose a folder")
    written = write_report(Path(args.folder), out)
    if args.json:
        print(json.dumps(written.summary, indent=1))
        return 0
    print(f"{args.folder}: {headline(written.summary)}")
    for text in written.summary["missing"]:
        print(f"missing: {text}")
    print(f"report: {written.page}")
    return 0
