"""`tsmoe preflight`: check what a pretraining run needs, on the very ranks that would train."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tsmoe.commands.options import require_finite
from tsmoe.commands.pretrain import add_run_arguments

if TYPE_CHECKING:
    from tsmoe.preflight import PreflightReport
    from tsmoe.train.run_config import RunConfig


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    preflight = subparsers.add_parser(
        "preflight",
        help="check machines, network, data and one step of a run before it is started",
        description="Check what `tsmoe pretrain` with the same arguments needs: one process, or "
        "all ranks under the same launcher. Prints a table; exit code 0 also with warnings, 3 if a "
        "check failed, on every rank. The run folder is left as it was.",
    )
    add_run_arguments(preflight)
    preflight.add_argument("--json", metavar="OUT", help="write the results; - is standard output")
    preflight.add_argument(
        "--minimum-free-gib", type=float, default=1.0,
        help="of disk, that must be left beside the checkpoints (default: 1)",
    )  # fmt: skip
    preflight.add_argument(
        "--timeout-seconds", type=float, default=300.0,
        help="that each check may take, and all ranks to come (default: 300)",
    )  # fmt: skip
    preflight.set_defaults(run=_preflight)


def _preflight(args: argparse.Namespace) -> int:
    from data_pipeline.storage.cache import cache_folder
    from tsmoe.preflight import PreflightOptions, run_preflight
    from tsmoe.ranks import launched_world_size
    from tsmoe.train.run_config import resolve

    require_finite("minimum_free_gib", args.minimum_free_gib, above=-1e-9)
    require_finite("timeout_seconds", args.timeout_seconds, above=0)

    def load() -> RunConfig:
        from tsmoe.evaluate.report import check_output

        world_size = launched_world_size()
        config = resolve(args.preset, args.settings)
        config.check_world_size(world_size)
        if args.json not in (None, "-"):
            check_output("--json", args.json, (".json",))
        return config

    options = PreflightOptions(
        cache=cache_folder(),
        timeout_seconds=args.timeout_seconds,
        minimum_free_gib=args.minimum_free_gib,
    )
    return run_preflight(load, options, lambda report: _publish(args, report))


def _publish(args: argparse.Namespace, report: PreflightReport) -> None:
    import json
    import sys

    from rich.console import Console

    from tsmoe.evaluate.report import replace_file
    from tsmoe.preflight.table import as_json, as_table, summary

    text = json.dumps(as_json(report), indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        # A pipe has no width of its own; a narrow guess would fold the cells.
        Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(as_table(report))
        print(summary(report))
    sys.stdout.flush()
    if args.json not in (None, "-"):
        with replace_file(args.json) as path:
            path.write_text(text, encoding="utf-8")
