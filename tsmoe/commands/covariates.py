"""Covariates of a table on the command line: which columns, and what of them is known ahead.

Shapes: C variates, F covariates known in the future, L rows, Q prediction steps.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsmoe.commands.options import split_names
from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from data_pipeline.table import Table
    from tsmoe.inference import Forecaster


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


def add_covariate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name covariates."""
    parser.add_argument(
        "--covariates",
        help="columns that are seen and not forecast, as a,b (default: those of the package)",
    )
    parser.add_argument(
        "--known-future", help="those of them whose values are known for the steps to forecast"
    )


def order_covariates(
    args: argparse.Namespace, table: Table, forecaster: Forecaster
) -> CovariateTable:
    """Put covariates behind the targets: those of the options, or that the package learned with.

    Raises:
        ConfigError: if a name is not a column, nothing is left to forecast, or the package has no
            use for covariates.
    """
    covariates = split_names("--covariates", args.covariates)
    known = split_names("--known-future", args.known_future)
    if covariates is None:
        if known is not None:
            raise ConfigError("--known-future names covariates; name all of them by --covariates")
        covariates, known = _of_package(forecaster.card)
    known = known or []
    if covariates and not forecaster.mixes_variates:
        raise ConfigError(
            "--covariates: this package forecasts each variate by itself; fine-tune it with "
            "table.covariates and mixing.num_channel_mixed_layers, or leave the option out"
        )
    for option, names, among in (
        ("--covariates", covariates, list(table.variates)),
        ("--known-future", known, covariates),
    ):
        if strangers := [name for name in names if name not in among]:
            raise ConfigError(
                f"{option}: {strangers[0]!r} is none of {', '.join(among[:20]) or 'none'}"
                + ("" if args.covariates else " (the package learned with it)")
            )
    targets = [name for name in table.variates if name not in covariates]
    if not targets:
        raise ConfigError(f"{table.path}: all columns are covariates; leave one to forecast")
    order = [*targets, *(name for name in covariates if name not in known), *known]
    places = [table.variates.index(name) for name in order]
    return CovariateTable(
        table=replace(table, variates=tuple(order), values_LC=table.values_LC[:, places].copy()),
        num_covariates=len(covariates),
        num_known_future=len(known),
    )


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
        raise ConfigError(
            f"{table.path}: {', '.join(table.variates[-known:])} must be known for the {horizon} "
            f"steps to forecast, but only {ahead} rows follow the last value of the others; add "
            f"rows with these columns alone, or use --horizon {max(1, ahead)}"
        )
    past = replace(
        table,
        values_LC=table.values_LC[:end],
        timestamps=None if table.timestamps is None else table.timestamps[:end],
    )
    future_FQ = table.values_LC[end : end + horizon, len(table.variates) - known :].T
    return replace(data, table=past), np.ascontiguousarray(future_FQ)


def _of_package(card: dict[str, Any]) -> tuple[list[str], list[str]]:
    learned = card.get("fine_tuning", {})
    variates = learned.get("variates", [])
    count, known = learned.get("num_covariates", 0), learned.get("num_known_future", 0)
    return variates[len(variates) - count :], variates[len(variates) - known :]
