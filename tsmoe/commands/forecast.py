"""`tsmoe forecast`: continue a table with a package and write numbers, intervals and a picture.

Shapes: C variates, L context steps, Q prediction steps, K quantile levels.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from tsmoe.commands.covariates import (
    add_covariate_options,
    read_covariate_table,
    seen_by,
    split_future,
)
from tsmoe.commands.options import (
    add_table_options,
    require_positive,
    split_names,
    split_numbers,
)
from tsmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from data_pipeline.table import Table


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser("forecast", help="continue a table with a package")
    parser.add_argument("package", help="folder of the package")
    parser.add_argument("data", help="CSV or Parquet table, one row per time step")
    parser.add_argument("--horizon", type=int, default=96, help="steps predicted (default: 96)")
    parser.add_argument("--task", help="of a patch_moe that has several: which one forecasts")
    parser.add_argument(
        "--context",
        type=int,
        help="last rows seen (default: the context length of the package, or all if fewer)",
    )
    parser.add_argument("--quantiles", help="levels as 0.1,0.5,0.9 (default: none)")
    parser.add_argument(
        "--out", metavar="OUT.csv", help="CSV or Parquet file (default: CSV on standard output)"
    )
    parser.add_argument("--plot", metavar="OUT.png", help="draw context, forecast and quantiles")
    parser.add_argument("--json", action="store_true", help="print the forecast as JSON")
    add_table_options(parser)
    add_covariate_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Forecast the rows after the last one of the table."""
    require_positive("horizon", args.horizon)
    require_positive("context", args.context)
    asked = split_numbers("--quantiles", args.quantiles) if args.quantiles is not None else ()
    import numpy as np

    from tsmoe.evaluate.metrics import interpolate_levels
    from tsmoe.evaluate.report import ForecastPicture, check_output, draw_forecast

    if args.out is not None:
        check_output("--out", args.out, (".csv", ".parquet"))
    if args.plot is not None:
        check_output("--plot", args.plot, (".png",))

    from tsmoe.tasks.predictor import load_forecaster

    split_names("--columns", args.columns)
    forecaster = load_forecaster(args.package, device=args.device, task=args.task)
    data, future_FQ = split_future(read_covariate_table(args, forecaster), args.horizon)
    data = seen_by(data, forecaster)
    future_FQ = future_FQ[: data.num_known_future]
    table = data.table
    levels = tuple(forecaster.quantile_levels)
    check_levels(asked, levels)
    learned = forecaster.card.get("table", {}).get("context_length")
    usual = learned or forecaster.context_length
    rows = _context_rows(args.context, len(table.values_LC), usual)
    context_CL = np.ascontiguousarray(table.values_LC[-rows:].T)
    _check_observed(args.data, table, context_CL)
    forecast = forecaster.forecast_batch(
        context_CL[None],
        args.horizon,
        num_covariates=data.num_covariates,
        future_BFQ=future_FQ[None],
    )
    table = replace(table, variates=table.variates[: data.num_targets])
    context_CL = context_CL[: data.num_targets]
    if not np.isfinite(forecast.mean_BCQ).all():
        raise DataError(
            f"{args.package}: the forecast of {args.data} is not finite; the values may be too "
            "large, or the package damaged"
        )
    mean_CQ = forecast.mean_BCQ[0]
    quantiles_CQK = None if forecast.quantiles_BCQK is None else forecast.quantiles_BCQK[0]
    asked_CQK = None
    if asked and quantiles_CQK is not None:
        asked_CQK = interpolate_levels(quantiles_CQK, levels, asked)

    frame = forecast_frame(
        table, mean_CQ, asked_CQK, levels=asked, time_column=args.time_column or "date"
    )
    if args.out is not None:
        write_frame(frame, args.out)
    if args.json:
        _print_json(frame, table, rows=rows, levels=asked)
    elif args.out is None:
        write_csv(frame, sys.stdout)
    if args.plot is not None:
        times = None
        if table.timestamps is not None:
            future = table.continued_timestamps(args.horizon)
            times = np.concatenate([table.timestamps[-rows:], future])
        picture = ForecastPicture(
            variates=table.variates,
            context_CL=context_CL,
            mean_CQ=mean_CQ,
            quantiles_CQK=quantiles_CQK,
            quantile_levels=levels,
            times=times,
        )
        draw_forecast(picture, args.plot)
    return 0


def _check_observed(path: str, table: "Table", context_CL: "np.ndarray") -> None:
    """Refuse a variate of which the context shows nothing: its forecast would be made up."""
    import numpy as np

    is_empty_C = np.isnan(context_CL).all(axis=1)
    if is_empty_C.any():
        names = ", ".join(
            name for name, empty in zip(table.variates, is_empty_C, strict=True) if empty
        )
        raise DataError(
            f"{path}: {names}: no value in the last {context_CL.shape[1]} rows, so there is "
            "nothing to forecast from; leave it out with --columns, or see more with --context"
        )


def check_levels(asked: tuple[float, ...], levels: tuple[float, ...]) -> None:
    """Refuse quantile levels that the head cannot give.

    Raises:
        ConfigError: naming the levels of the package.
    """
    if not asked:
        return
    if not levels:
        raise ConfigError(
            "--quantiles: the package has a point head, its quantile levels are none; "
            "leave the option out or use a package with a quantile head"
        )
    for level in asked:
        if not levels[0] <= level <= levels[-1]:
            raise ConfigError(
                f"--quantiles: {level:g} lies outside the package's levels "
                f"({', '.join(f'{own:g}' for own in levels)}); the tails are not extrapolated"
            )
    if len(set(asked)) < len(asked):
        raise ConfigError(f"--quantiles: a level is given twice in {asked}")


def forecast_frame(
    table: "Table",
    mean_CQ: "np.ndarray",
    asked_CQK: "np.ndarray | None",
    *,
    levels: tuple[float, ...],
    time_column: str,
) -> "pd.DataFrame":
    """Lay a forecast out wide: time, then `NAME` and `NAME@LEVEL` for each variate.

    Without timestamps the first column is `row`, counted on from the table's (from 0).

    Raises:
        ConfigError: if two columns would have the same name.
    """
    import pandas as pd

    horizon = mean_CQ.shape[1]
    first_name = "row" if table.timestamps is None else time_column
    named: list[tuple[str, np.ndarray]] = [(first_name, table.continued_timestamps(horizon))]
    for variate, name in enumerate(table.variates):
        named.append((name, mean_CQ[variate]))
        for k, level in enumerate(levels):
            assert asked_CQK is not None, "check_levels has passed"
            named.append((f"{name}@{level:g}", asked_CQK[variate, :, k]))
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{table.path}: the forecast would have two columns {twice[0]!r}; rename the variate "
            "or leave it out with --columns"
        )
    return pd.DataFrame(dict(named))


def _context_rows(asked: int | None, there: int, package_length: int) -> int:
    if asked is not None and asked > there:
        raise ConfigError(
            f"--context {asked} is more than the rows of the table ({there}); leave it out to use "
            "all rows"
        )
    return min(there, asked or package_length)


def write_frame(frame: "pd.DataFrame", path: str) -> None:
    """Write CSV, or Parquet where the name ends so; no half file is left."""
    from tsmoe.evaluate.report import replace_file

    with replace_file(path) as unfinished:
        if Path(path).suffix.lower() == ".parquet":
            frame.to_parquet(unfinished, index=False)
        else:
            with unfinished.open("w", encoding="utf-8", newline="") as file:
                write_csv(frame, file)


def write_csv(frame: "pd.DataFrame", file: TextIO) -> None:
    """Write CSV."""
    frame.to_csv(file, index=False, lineterminator="\n")


def _print_json(
    frame: "pd.DataFrame", table: "Table", *, rows: int, levels: tuple[float, ...]
) -> None:
    time = frame.iloc[:, 0]
    stamps = time.tolist() if table.timestamps is None else time.astype(str).tolist()
    variates = {
        name: {
            "mean": frame[name].tolist(),
            "quantiles": {f"{level:g}": frame[f"{name}@{level:g}"].tolist() for level in levels},
        }
        for name in table.variates
    }
    document = {
        "data": table.path,
        "freq": table.freq,
        "context": rows,
        "horizon": len(frame),
        "time": stamps,
        "variates": variates,
    }
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")
