"""Which columns of a table are forecast, which only help, and what of those is known ahead.

A package that was fine-tuned knows the columns it learned with; options name others.

Shapes: F covariates known in the future, L rows, Q prediction steps.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsmoe.commands.options import read_table_of, split_names
from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.table import Table
    from tsmoe.inference import Forecaster
    from tsmoe.tasks.predictor import TaskForecaster

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CovariateTable:
    """A table whose last variates are covariates, those that are known ahead last of all."""

    table: Table
    num_covariates: int
    num_known_future: int

    @property
    def num_targets(self) -> int:
        """First variates, which are forecast."""
        return len(self.table.variates) - self.num_covariates

    def without_covariates(self) -> CovariateTable:
        """Leave the targets alone."""
        count = self.num_targets
        table = replace(
            self.table,
            variates=self.table.variates[:count],
            values_LC=self.table.values_LC[:, :count].copy(),
        )
        return CovariateTable(table=table, num_covariates=0, num_known_future=0)


def add_covariate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name covariates."""
    parser.add_argument(
        "--covariates",
        help="columns that are seen and not forecast, as a,b (default: those of the package)",
    )
    parser.add_argument(
        "--known-future", help="those of them whose values are known for the steps to forecast"
    )


def read_covariate_table(
    args: argparse.Namespace, forecaster: Forecaster | TaskForecaster
) -> CovariateTable:
    """Read targets and covariates: those of the options, else those the package learned with.

    Raises:
        ConfigError: if a name is not a column, or nothing is left to forecast.
        DataError: for everything that is wrong with the file.
    """
    covariates = split_names("--covariates", args.covariates)
    known = split_names("--known-future", args.known_future)
    targets = split_names("--columns", args.columns)
    learned: dict[str, Any] = forecaster.card.get("table", {})
    if covariates is None and known is not None:
        raise ConfigError("--known-future names covariates; name all of them by --covariates")
    if covariates is None:
        covariates, known = learned.get("covariates", []), learned.get("known_future", [])
    known = known or []
    if strangers := [name for name in known if name not in covariates]:
        raise ConfigError(f"--known-future: {strangers[0]!r} is not among the covariates")
    if targets is not None:
        targets = [name for name in targets if name not in covariates]
    table = read_table_of(args, also=covariates)
    if strangers := [name for name in covariates if name not in table.variates]:
        why = "" if args.covariates else " (the package learned with it; --covariates names others)"
        raise ConfigError(
            f"{table.path}: no column {strangers[0]!r}, a covariate{why}; columns there: "
            f"{', '.join(table.variates[:20])}"
        )
    if targets is None:
        targets = [name for name in table.variates if name not in covariates]
        of_package = learned.get("targets", [])
        if forecaster.mixes_variates and of_package and set(of_package) < set(targets):
            logger.info(
                "%s: of its columns the package learned to forecast %s; --columns names others",
                table.path, ", ".join(of_package[:20]),
            )  # fmt: skip
            targets = of_package
    if not targets:
        raise ConfigError(f"{table.path}: all columns are covariates; leave one to forecast")
    order = [*targets, *(name for name in covariates if name not in known), *known]
    places = [table.variates.index(name) for name in order]
    return CovariateTable(
        table=replace(table, variates=tuple(order), values_LC=table.values_LC[:, places].copy()),
        num_covariates=len(covariates),
        num_known_future=len(known),
    )


def seen_by(data: CovariateTable, forecaster: Forecaster | TaskForecaster) -> CovariateTable:
    """Leave covariates out, and say so, where the package forecasts each variate by itself."""
    if not data.num_covariates or forecaster.mixes_variates:
        return data
    logger.warning(
        "this package forecasts each variate by itself; covariates (%s) are left out",
        ", ".join(data.table.variates[data.num_targets :][:20]),
    )
    return data.without_covariates()


def split_future(data: CovariateTable, horizon: int) -> tuple[CovariateTable, np.ndarray]:
    """Cut off the last rows, which hold nothing but covariates that are known ahead.

    Returns:
        The table up to the last row that holds more, and future_FQ; F is 0 if nothing is known.

    Raises:
        ConfigError: if fewer rows are given than steps are to be forecast.
    """
    import numpy as np

    table, known = data.table, data.num_known_future
    if not known:
        return data, np.empty((0, horizon), np.float32)
    is_past_L = np.isfinite(table.values_LC[:, : len(table.variates) - known]).any(axis=1)
    end = int(np.flatnonzero(is_past_L)[-1]) + 1 if is_past_L.any() else 0
    ahead = len(table.values_LC) - end
    if ahead < horizon:
        shorter = f", or use --horizon {ahead}" if ahead else ""
        raise ConfigError(
            f"{table.path}: {', '.join(table.variates[-known:])} must be known for the {horizon} "
            f"steps to forecast, but {ahead or 'no'} rows follow the last value of the others; add "
            f"rows with these columns alone{shorter}"
        )
    past = replace(
        table,
        values_LC=table.values_LC[:end],
        timestamps=None if table.timestamps is None else table.timestamps[:end],
    )
    future_FQ = table.values_LC[end : end + horizon, len(table.variates) - known :].T
    return replace(data, table=past), np.ascontiguousarray(future_FQ)
