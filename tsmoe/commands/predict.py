"""`tsmoe predict`: flags, fillings, classes and forecasts of series by a package of patch_moe."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "predict",
        help="flag anomalies, fill gaps, classify cases or continue series with a package",
        description="Answer for data without labels, with a package that `tsmoe finetune "
        "patch_moe_...` made: anomaly (score and flag of each row), imputation (the table without "
        "gaps), classification (class of each case), series (what follows each). Tables are "
        "forecast by `tsmoe forecast`.",
    )
    parser.add_argument("package", help="folder of the package")
    parser.add_argument("data", help="file laid out as in training; labels are not needed")
    parser.add_argument(
        "--task", help="kind or name of the task (default: the only one of the package)"
    )
    parser.add_argument(
        "--out", metavar="OUT.csv", help="CSV or Parquet file (default: CSV on standard output)"
    )
    parser.add_argument("--entity-column", help="of recordings (default: as in training)")
    parser.add_argument("--time-column", help="column of times (default: as in training)")
    parser.add_argument(
        "--ignore-time", action="store_true", help="take the rows of a table as they stand"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--batch-size", type=int, default=256, help="sequences at once")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer and write the file."""
    from tsmoe.commands.options import require_positive
    from tsmoe.evaluate.report import check_output

    require_positive("batch_size", args.batch_size)
    if args.out is not None:
        check_output("--out", args.out, (".csv", ".parquet"))
    from tsmoe.errors import CheckpointError, ConfigError
    from tsmoe.tasks.answers import answer
    from tsmoe.tasks.predictor import load_predictor

    predictor = load_predictor(args.package, device=args.device, batch_size=args.batch_size)
    try:
        found = answer(
            predictor,
            args.data,
            task=args.task,
            entity_column=args.entity_column,
            time_column=args.time_column,
            ignores_time=args.ignore_time,
        )
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"{args.package}: {error}") from error
    _write(found, args.out)
    return 0


def _write(found: pa.Table, out: str | None) -> None:
    """Write Parquet in the types of the file, or CSV."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tsmoe.commands.forecast import write_csv, write_frame
    from tsmoe.errors import ConfigError
    from tsmoe.evaluate.report import replace_file

    if out is not None and out.lower().endswith(".parquet"):
        with replace_file(out) as unfinished:
            pq.write_table(found, unfinished)
        return
    try:
        frame = found.to_pandas(integer_object_nulls=True)
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(
            f"--out: the file has a column that CSV cannot hold ({error}); write Parquet: "
            "--out OUT.parquet"
        ) from error
    if out is None:
        write_csv(frame, sys.stdout)
    else:
        write_frame(frame, out)
