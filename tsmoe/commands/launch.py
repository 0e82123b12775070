"""`tsmoe launch`: start a command on machines, or hand it to their queue."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    from launcher.plan import Job, PlannedStart
    from launcher.spec import LaunchSpec


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    launch = subparsers.add_parser(
        "launch",
        help="start a command on many machines: slurm, deepspeed, accelerate, or this one",
        description="Start a tsmoe command as a launch file says. Training that ends too early is "
        "started again from its newest checkpoint.",
        epilog="example: tsmoe launch mine.yaml nodes=4 -- pretrain time_tracker_base run=runs/a",
    )
    launch.add_argument("file", metavar="LAUNCH.yaml", help="backend, machines and restarts")
    launch.add_argument(
        "settings", metavar="KEY=VALUE", nargs="*", help="such as nodes=4 backend.partition=gpu"
    )
    mode = launch.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print what would be started")
    mode.add_argument(
        "--check", action="store_true", help="run `tsmoe preflight` on the machines, and wait"
    )
    launch.set_defaults(run=_launch, parsers=subparsers.choices, command=[])


def _launch(args: argparse.Namespace) -> int:
    import contextlib
    from dataclasses import replace
    from pathlib import Path

    from launcher import execute, plan, preflight
    from launcher.errors import LaunchError
    from launcher.spec import LaunchSpec
    from tsmoe.config import decode, merge_layers, parse_override, read_yaml

    layers = [read_yaml(Path(args.file)), *map(parse_override, args.settings)]
    spec = decode(LaunchSpec, merge_layers(*layers), origin=args.file)
    folder = Path(spec.folder).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"{args.file}: folder {folder} does not exist; make it or name another")
    spec = replace(spec, folder=str(folder))
    command = tuple(args.command)
    try:
        if args.check:
            spec, command = preflight.as_check(spec, command)
        with contextlib.chdir(folder):
            jobs = plan.jobs_of(spec, command, lambda words: _run_folder(words, args.parsers))
            jobs = [_checked(job, args.parsers) for job in jobs]
        starts = plan.plan(spec, jobs, python=sys.executable)
        if args.dry_run:
            print(plan.as_text(starts))
            return 0
        preflight.check_here(spec, starts)
        if not spec.backend.is_queued:
            return execute.run_all(starts, spec.restarts)
        numbers = execute.submit_all(starts)
        if args.check:
            return _wait(spec, starts[0], numbers)
    except LaunchError as error:
        raise ConfigError(str(error)) from error
    for start in starts:
        number = numbers[start.job.name]
        logs = _log_of(spec, start, number)
        print(f"submitted {start.job.name} as job {number}; log: {logs}")
        if start.job.run is not None:
            print(f"watch it: tsmoe status {start.job.run}")
    return 0


def _parsed(words: Sequence[str], parsers: dict[str, argparse.ArgumentParser]) -> Any:
    """Parse a command as the ranks will, so that a slip is found before anything is queued."""
    if words[0] not in parsers:
        raise ConfigError(f"{words[0]!r} is no command; there are {', '.join(parsers)}")
    args, left = parsers[words[0]].parse_known_args(list(words[1:]))
    if left and ("settings" not in args or any(w.startswith("-") or "=" not in w for w in left)):
        parsers[words[0]].error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        args.settings += left
    return args


def _run_folder(words: Sequence[str], parsers: dict[str, argparse.ArgumentParser]) -> str:
    """Say where a training has its run folder; where this process stands counts as its folder."""
    from pathlib import Path

    return str(Path(_config_of(words, parsers).run).absolute())


def _checked(job: Job, parsers: dict[str, argparse.ArgumentParser]) -> Job:
    """Refuse what the ranks would refuse, and find out on how many machines a job can run."""
    from dataclasses import replace

    if not job.is_ranked:
        _parsed(job.command, parsers)
        return job
    config = _config_of(job.command, parsers)
    most, *fewer = job.node_counts
    config.check_world_size(most * job.ranks_per_node)
    counts = [most]
    for nodes in fewer:
        try:
            config.check_world_size(nodes * job.ranks_per_node)
        except ConfigError as error:
            if nodes == fewer[-1]:
                raise ConfigError(f"backend.least_nodes is {nodes}: {error}") from error
        else:
            counts.append(nodes)
    return replace(job, node_counts=tuple(counts))


def _config_of(words: Sequence[str], parsers: dict[str, argparse.ArgumentParser]) -> Any:
    """Resolve the configuration of a training."""
    args = _parsed(words, parsers)
    if words[0] == "finetune":
        from tsmoe.commands.finetune import resolve_run

        return resolve_run(args.preset, args.settings)
    from tsmoe.train.run_config import resolve

    return resolve(args.preset, args.settings)


def _log_of(spec: LaunchSpec, start: PlannedStart, number: str) -> str:
    from pathlib import Path

    name = f"{start.job.name}-{number}{'_*' if start.job.array else ''}.log"
    return str(Path(spec.folder) / spec.log_folder / name)


def _wait(spec: LaunchSpec, start: PlannedStart, numbers: dict[str, str]) -> int:
    """Wait for a check in the queue and show what it found."""
    from pathlib import Path

    from launcher.preflight import wait_for

    number = numbers[start.job.name]
    log = Path(_log_of(spec, start, number))
    result = wait_for(number, log, tell=partial(print, file=sys.stderr))
    print(result.log, end="")
    print(f"job {number}: {result.state}", file=sys.stderr)
    return result.exit_code
