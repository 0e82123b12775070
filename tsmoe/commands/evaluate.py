"""`tsmoe evaluate`: compare a package with baselines on a table that it has not seen."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tsmoe.commands.covariates import add_covariate_options, read_covariate_table, seen_by
from tsmoe.commands.options import (
    add_table_options,
    require_positive,
    split_names,
    split_numbers,
)
from tsmoe.errors import ConfigError

logger = logging.getLogger(__name__)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser("evaluate", help="compare a package with baselines on a table")
    parser.add_argument("package", help="folder of the package")
    parser.add_argument("--task", choices=["forecast"], default="forecast")
    parser.add_argument("--data", required=True, help="CSV or Parquet table, one row per time step")
    parser.add_argument("--context", type=int, default=672, help="steps seen (default: 672)")
    parser.add_argument("--horizon", type=int, default=96, help="steps predicted (default: 96)")
    parser.add_argument("--protocol", choices=["ltsf"], default="ltsf")
    parser.add_argument(
        "--split",
        help="shares of train, validation and test (default: the months of the ETT sets, "
        "else 0.7,0.1,0.2)",
    )
    parser.add_argument("--season", type=int, help="rows in one season (default: by interval)")
    parser.add_argument("--batch-size", type=int, default=256, help="windows at once")
    parser.add_argument("--json", metavar="OUT", help="write the results; - is standard output")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the middle test window")
    add_table_options(parser)
    add_covariate_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print or write the results."""
    for option in ("context", "horizon", "season", "batch_size"):
        require_positive(option, getattr(args, option))
    split = _parse_split(args.split)
    from tsmoe.evaluate.report import check_output, draw_forecast, replace_file, scores_table

    if args.json not in (None, "-"):
        check_output("--json", args.json, (".json",))
    if args.plot is not None:
        check_output("--plot", args.plot, (".png",))

    from tsmoe.evaluate.forecast import evaluate_forecast
    from tsmoe.inference import Forecaster

    split_names("--columns", args.columns)
    forecaster = Forecaster.load(args.package, device=args.device)
    data = seen_by(read_covariate_table(args, forecaster), forecaster)
    if args.context > forecaster.context_length:
        logger.warning(
            "the package looks back %d steps; of the %d of --context only the baselines use more",
            forecaster.context_length, args.context,
        )  # fmt: skip
    with _progress() as progress:
        evaluation = evaluate_forecast(
            forecaster,
            data.table,
            context_length=args.context,
            prediction_length=args.horizon,
            protocol=args.protocol,
            split=split,
            season=args.season,
            batch_size=args.batch_size,
            num_covariates=data.num_covariates,
            num_known_future=data.num_known_future,
            progress=progress,
        )
    text = json.dumps(evaluation.to_json_dict(), indent=2) + "\n"
    if args.json == "-":
        sys.stdout.write(text)
    else:
        from rich.console import Console

        title = (
            f"{evaluation.data}: {evaluation.windows} test windows, context {args.context}, "
            f"horizon {args.horizon}, {len(evaluation.variates)} variates"
        )
        console = Console()
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        console.print(scores_table(evaluation.scores))
    if args.json not in (None, "-"):
        with replace_file(args.json) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    if args.plot is not None:
        draw_forecast(evaluation.example, args.plot)
    return 0


def _parse_split(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    shares = split_numbers("--split", text)
    if len(shares) != 3:
        raise ConfigError(f"--split {text!r}: expected three shares as 0.7,0.1,0.2")
    return shares[0], shares[1], shares[2]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show windows done: a bar on a terminal, else a log line whenever a tenth is full."""
    if not sys.stderr.isatty():
        tenths = {0}

        def log_tenth(done: int, total: int) -> None:
            if 10 * done // total not in tenths:
                tenths.add(10 * done // total)
                logger.info("evaluated %d of %d windows", done, total)

        yield log_tenth
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("windows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
