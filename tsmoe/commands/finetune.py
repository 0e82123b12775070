"""`tsmoe finetune`: fit a pretrained model to a table, and hand over none that got worse."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tsmoe.finetune.config import FinetuneConfig
    from tsmoe.tasks.config import TaskRunConfig


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the sub-command."""
    finetune = subparsers.add_parser(
        "finetune",
        help="fit a package to a table, or train on it from scratch",
        description="Fine-tune on a CSV or Parquet table: model=PACKAGE data=TABLE. With one "
        "process as it is, with many under deepspeed, torchrun, accelerate or srun.",
    )
    finetune.add_argument("preset", metavar="PRESET|FILE.yaml", help="name of a preset, or a file")
    finetune.add_argument(
        "settings", metavar="KEY=VALUE", nargs="*", help="such as model=PACKAGE data=table.csv"
    )
    finetune.add_argument("--json", action="store_true", help="print result.json")
    # DeepSpeed's launcher passes it; the environment says the same.
    finetune.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    finetune.set_defaults(run=_finetune, stops_on_request=True)


def resolve_run(name_or_path: str, settings: list[str]) -> FinetuneConfig | TaskRunConfig:
    """Resolve the configuration of a run of either kind.

    Raises:
        ConfigError: one line that names the keys.
    """
    from tsmoe.finetune.config import resolve_finetune
    from tsmoe.tasks.config import resolve_tasks
    from tsmoe.train.run_config import FINE_TUNING, read_preset

    preset = read_preset(name_or_path, FINE_TUNING)
    if "tasks" in preset:
        return resolve_tasks(preset, name_or_path, settings)
    return resolve_finetune(name_or_path, settings)


def _finetune(args: argparse.Namespace) -> int:
    from pathlib import Path

    from tsmoe.launcher_watch import stop_without_launcher

    stop_without_launcher()  # before torch is imported, which takes seconds
    from tsmoe.finetune.loop import finetune
    from tsmoe.finetune.result import RESULT_FILE
    from tsmoe.ranks import launched_world_size, stop
    from tsmoe.tasks.config import TaskRunConfig
    from tsmoe.train.loop import Outcome

    config = resolve_run(args.preset, args.settings)
    if isinstance(config, TaskRunConfig):
        return _train_tasks(args, config)
    outcome, result = finetune(config)
    stop()
    if result is not None and args.json:
        print((Path(config.run) / RESULT_FILE).read_text(encoding="utf-8"), end="")
    elif result is not None:
        from rich.console import Console

        from tsmoe.evaluate.report import scores_table

        console = Console()
        title = (
            f"{config.table.path}: {result.windows} test windows, "
            f"horizon {config.table.prediction_length}"
        )
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        console.print(scores_table(result.scores))
        for line in (result.verdict, f"package: {result.package}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if outcome is Outcome.STOPPED and launched_world_size() == 1:
        return 75
    # Launchers take any other code for a failure; the markers DONE and REQUEUE tell the rest.
    return 0


def _train_tasks(args: argparse.Namespace, config: TaskRunConfig) -> int:
    """Train a model of supervised tasks from scratch."""
    from pathlib import Path

    from tsmoe.ranks import launched_world_size, stop
    from tsmoe.tasks.run import RESULT_FILE, train_tasks
    from tsmoe.train.loop import Outcome

    outcome, result = train_tasks(config)
    stop()
    if result is not None and args.json:
        print((Path(config.run) / RESULT_FILE).read_text(encoding="utf-8"), end="")
    elif result is not None:
        from rich.console import Console

        from tsmoe.tasks.report import print_evaluation

        console = Console()
        for name, evaluation in result.evaluations.items():
            title = f"{name}: {evaluation.data}, {evaluation.describe()}"
            print_evaluation(console, evaluation, title=title)
        for line in (result.verdict, f"package: {result.package}"):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 75 if outcome is Outcome.STOPPED and launched_world_size() == 1 else 0
