"""`tsmoe evaluate` of a package of supervised tasks."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from tsmoe.commands.options import split_names
from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    from tsmoe.tasks.predictor import TaskPredictor

# Options of `tsmoe evaluate` that such a package has no use for, with what they are when not given.
_OF_OTHERS = {"covariates": None, "known_future": None, "plot": None, "season": None}


def evaluate_tasks(
    args: argparse.Namespace,
    predictor: TaskPredictor,
    *,
    split: tuple[float, float, float] | None,
) -> int:
    """Evaluate one task and print or write the results."""
    from tsmoe.evaluate.report import replace_file
    from tsmoe.tasks.reopen import reopen_task

    for option, default in _OF_OTHERS.items():
        if getattr(args, option, default) != default:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for packages of time_tracker; leave it out"
            )
    if args.protocol == "gift":
        raise ConfigError("--protocol gift is for packages of time_tracker; use ltsf or tfb")
    if args.protocol == "tfb" and args.task != "forecast":
        raise ConfigError(f"--protocol tfb is for forecasts, but --task is {args.task}")
    if args.context not in (None, predictor.context_length):
        raise ConfigError(
            f"--context is {args.context}, but the package sees {predictor.context_length} steps; "
            "leave it out"
        )
    task = reopen_task(
        predictor,
        args.task,
        args.data,
        columns=split_names("--columns", args.columns),
        time_column=args.time_column,
        ignores_time=args.ignore_time,
        split=split,
        prediction_length=args.horizon,
        test_path=args.test_data,
    )
    evaluation = task.evaluate(predictor)
    text = json.dumps(evaluation.to_json_dict(), indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
        return 0
    from rich.console import Console

    from tsmoe.tasks.report import print_evaluation

    title = f"{evaluation.data}: {evaluation.describe()}"
    print_evaluation(Console(), evaluation, title=title)
    if args.json is not None:
        with replace_file(args.json) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return 0
