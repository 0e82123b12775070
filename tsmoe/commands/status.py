"""`tsmoe status`: how runs stand, at a glance, again and again, or for a monitor."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    from tsmoe.status import RunStatus


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    status = subparsers.add_parser(
        "status",
        help="show how runs stand: step, time left, speed, loss, checkpoint, restarts, health",
        description="Show how runs stand, from the files in their folders. Nothing in them is "
        "touched. Exit code 3 if a RUN is no folder of a run, else 0 whatever its health.",
    )
    status.add_argument("folders", metavar="RUN", nargs="+", help="folder of a run")
    status.add_argument("--json", action="store_true", help="print the values")
    status.add_argument(
        "--prometheus", metavar="FILE",
        help="also write FILE for the textfile collector of node_exporter (name it *.prom)",
    )  # fmt: skip
    status.add_argument(
        "--watch", metavar="SECONDS", type=float,
        help="look again so often, until all runs are done or you press Ctrl-C",
    )  # fmt: skip
    status.set_defaults(run=_status)


def _status(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    if args.watch is not None and not 0.1 <= args.watch < float("inf"):
        raise ConfigError(f"--watch {args.watch:g} must be at least 0.1 seconds")
    if args.prometheus is not None:
        target = Path(args.prometheus)
        if target.is_dir() or not target.parent.is_dir():
            raise ConfigError(
                f"--prometheus {target}: give a file in a folder that exists, such as "
                "/var/lib/node_exporter/tsmoe.prom"
            )
    if args.watch is None:
        statuses, problems = _look(args)
        if statuses:
            print(_text(args, statuses))
        for problem in problems:
            print(f"tsmoe: {problem}", file=sys.stderr)
        return 3 if problems else 0
    return _watch(args)


def _look(args: argparse.Namespace) -> tuple[list[RunStatus], list[str]]:
    """Look at all runs once; return those that are some, and what is wrong with the others."""
    from pathlib import Path

    from tsmoe.errors import DataError
    from tsmoe.status import look_at
    from tsmoe.status.prometheus import write_prometheus

    statuses, problems = [], []
    for folder in args.folders:
        try:
            statuses.append(look_at(Path(folder)))
        except DataError as error:
            problems.append(str(error))
        except OSError as error:  # a run of somebody else that may not be read
            problems.append(f"{folder}: cannot be looked at ({error})")
    if args.prometheus is not None:
        write_prometheus(Path(args.prometheus), statuses)
    return statuses, problems


def _text(args: argparse.Namespace, statuses: list[RunStatus]) -> str:
    import json

    from tsmoe.status.table import table

    if args.json:
        values = {"runs": [status.to_json_dict() for status in statuses]}
        return json.dumps(values, indent=1 if args.watch is None else None)
    return table(statuses)


def _watch(args: argparse.Namespace) -> int:
    """Look again and again: on a terminal in place, elsewhere line after line."""
    import sys

    if args.json or not sys.stdout.isatty():
        return _repeat(args, lambda text: print(text, flush=True))
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        return _repeat(
            args, lambda text: live.update(Text(text, no_wrap=True, overflow="crop"), refresh=True)
        )


def _repeat(args: argparse.Namespace, show: Callable[[str], None]) -> int:
    import time

    from tsmoe.status import Health

    problems: list[str] = []
    try:
        while True:
            statuses, problems = _look(args)
            show(_text(args, statuses) if args.json else _with(problems, _text(args, statuses)))
            if problems and not statuses:
                return 3
            if not problems and all(status.health is Health.DONE for status in statuses):
                return 0
            time.sleep(args.watch)
    except KeyboardInterrupt:
        return 3 if problems else 0


def _with(problems: list[str], text: str) -> str:
    return "\n".join([text, *problems])
