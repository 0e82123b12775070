"""The program `tsmoe`: parse, run a sub-command, turn expected errors into one line and a code."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys

from tsmoe import __version__
from tsmoe.errors import ConfigError, TsmoeError
from tsmoe.exit_code import leave_exit_code
from tsmoe.train.signals import unblock_stop_signals

_COMMANDS = (
    "data", "pretrain", "finetune", "evaluate", "forecast", "predict", "plan", "preflight",
    "launch", "status", "report",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all sub-commands; imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="tsmoe",
        description="Pretrain, evaluate and use sparse Mixture-of-Experts time-series models.",
    )
    parser.add_argument("--version", action="version", version=f"tsmoe {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"tsmoe.commands.{name}").add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0 done, 2 user mistake, 3 bad data, 75 stopped."""
    args = _parse(_launcher_arguments_last(arguments or sys.argv[1:]))
    _set_up_logging()
    if not getattr(args, "stops_on_request", False):
        # A launcher may have blocked them for commands that save before they end.
        unblock_stop_signals()
    code = _run(args)
    leave_exit_code(code)
    return code


def _run(args: argparse.Namespace) -> int:
    """Run the sub-command; expected errors become one line and an exit code."""
    try:
        return args.run(args)
    except TsmoeError as error:
        if args.debug:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or not isinstance(error, ConfigError):
            # A wrong setting is wrong on every rank alike; one line is enough.
            print(f"tsmoe: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tsmoe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has seen enough.
        sys.stderr.close()
        return 0
    except OSError as error:
        # A full disk, a folder without permission: the system's words say what and where.
        if args.debug:
            raise
        print(f"tsmoe: {error}; mend it and start the same command again", file=sys.stderr)
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = build_parser()
    if "launch" in arguments and "--" in arguments[arguments.index("launch") :]:
        # What follows is a command of its own; argparse would share it out among the arguments.
        place = arguments.index("--", arguments.index("launch"))
        args = _parse(arguments[:place])
        args.command = arguments[place + 1 :]
        return args
    args, left = parser.parse_known_args(arguments)
    # argparse takes the settings of KEY=VALUE in one piece only; they may also stand after options.
    if left and ("settings" not in args or any(a.startswith("-") or "=" not in a for a in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.settings += left
    return args


def _set_up_logging() -> None:
    is_first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    logging.basicConfig(
        level=logging.INFO if is_first else logging.WARNING,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )


def _launcher_arguments_last(arguments: list[str]) -> list[str]:
    # DeepSpeed's launcher puts --local_rank=N before the sub-command.
    injected = [a for a in arguments if a.startswith(("--local_rank=", "--local-rank="))]
    return [a for a in arguments if a not in injected] + injected


if __name__ == "__main__":
    sys.exit(main())
