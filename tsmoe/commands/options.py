"""Options that several sub-commands share, and what their values must be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tsmoe.errors import ConfigError

if TYPE_CHECKING:
    from data_pipeline.table import Table


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to read from a table and where to compute."""
    parser.add_argument("--columns", help="variates to use, as a,b (default: all)")
    parser.add_argument("--time-column", help="column of timestamps (default: found by itself)")
    parser.add_argument(
        "--ignore-time",
        action="store_true",
        help="take rows as they stand, whatever their timestamps (double or missing ones)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")


def read_table_of(args: argparse.Namespace, *, also: Sequence[str] = ()) -> Table:
    """Read the table that the options name; columns of `also` come with those of --columns."""
    from data_pipeline.table import read_table

    columns = split_names("--columns", args.columns)
    if columns is not None:
        columns += [name for name in also if name not in columns]
    return read_table(
        args.data,
        time_column=args.time_column,
        columns=columns,
        columns_option="--columns",
        ignores_time=args.ignore_time,
    )


def require_positive(option: str, value: int | None) -> None:
    """Refuse a count below 1; None means that the option was not given.

    Raises:
        ConfigError: naming the option and the value.
    """
    if value is not None and value < 1:
        raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {value}")


def require_finite(option: str, value: float | None, *, above: float) -> None:
    """Refuse a number that is not above a limit, infinite or NaN; None was not given.

    Raises:
        ConfigError: naming the option and the value.
    """
    if value is not None and not above < value < float("inf"):
        name = option.replace("_", "-")
        raise ConfigError(f"--{name} must be a finite number above {above:g}, got {value}")


def split_names(option: str, text: str | None) -> list[str] | None:
    """Split "a,b" into names; None stays None.

    Raises:
        ConfigError: if a name is empty or given twice.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(f"{option} {text!r}: expected different names as a,b")
    return names


def split_numbers(option: str, text: str) -> tuple[float, ...]:
    """Split "0.1,0.5" into numbers.

    Raises:
        ConfigError: if a part is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: expected numbers as 0.1,0.5") from error
