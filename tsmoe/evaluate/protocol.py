"""The protocol of long-term forecasting benchmarks (LTSF): borders, scaling and windows.

A table is cut in time into train, validation and test; every variate is standardised with the
train part; each window whose whole prediction lies in the test part is forecast once.

Shapes: B windows, C variates, L context steps (or rows of a table), Q prediction steps,
W = L + Q steps of a window.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from tsmoe.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

DEFAULT_SPLIT = (0.7, 0.1, 0.2)
"""Shares of train, validation and test for tables that have no borders of their own."""

MAX_BLOCK_VALUES = 2**23
"""Most values in one block of windows: 32 MiB in float32, whatever the number of variates."""

_ETT_MONTH_ROWS = {"h": 30 * 24, "m": 30 * 24 * 4}


@dataclass(frozen=True, kw_only=True)
class Borders:
    """Rows at which the parts of a table end; each part begins where the one before it ends."""

    train_end: int
    validation_end: int
    test_end: int

    def window_count(self, prediction_length: int) -> int:
        """Count the test windows at stride 1, the last one included."""
        return self.test_end - self.validation_end - prediction_length + 1


@dataclass(frozen=True, kw_only=True)
class Scaler:
    """Mean and standard deviation of each variate over the observed points of the train part."""

    mean_C: np.ndarray
    std_C: np.ndarray

    def scale(self, values_LC: np.ndarray) -> np.ndarray:
        """Standardise, in float32; NaN stays NaN."""
        return ((values_LC - self.mean_C) / self.std_C).astype(np.float32)

    def of_first(self, count: int) -> "Scaler":
        """Return that of the first variates alone."""
        return Scaler(mean_C=self.mean_C[:count], std_C=self.std_C[:count])

    def unscale(self, values_CQ: np.ndarray) -> np.ndarray:
        """Bring scaled values with the variates first back to the unit of the table."""
        return (values_CQ * self.std_C[:, None] + self.mean_C[:, None]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class WindowBlock:
    """Some of the windows of a part; `first` counts the windows that came before them."""

    first: int
    context_BCL: np.ndarray
    target_BCQ: np.ndarray

    def of_first(self, count: int) -> "WindowBlock":
        """Return the same windows of the first variates alone."""
        return WindowBlock(
            first=self.first,
            context_BCL=self.context_BCL[:, :count],
            target_BCQ=self.target_BCQ[:, :count],
        )


def ltsf_borders(
    path: str, num_rows: int, *, split: tuple[float, float, float] | None = None
) -> Borders:
    """Find the borders of a table: fixed months for the ETT sets, shares of the rows for others.

    Args:
        path: the name without folder and suffix decides; ETTh* and ETTm* have 12 months of 30
            days for training and 4 each for validation and test, later rows are not used.
        num_rows: rows of the table.
        split: shares of train, validation and test; overrides the rule by name.

    Raises:
        ConfigError: if the shares are not three positive numbers with sum 1.
        DataError: if a table with an ETT name has fewer rows than the 20 months.

    Source: Informer (arXiv 2012.07436) and Autoformer (arXiv 2106.13008), data loaders; the
    rounding (train and test down, validation takes the rest) is theirs.
    """
    if split is None:
        ett = re.match(r"ETT([hm])\d", PurePath(path).stem, flags=re.IGNORECASE)
        if ett is not None:
            return _ett_borders(path, num_rows, month_rows=_ETT_MONTH_ROWS[ett[1].lower()])
        split = DEFAULT_SPLIT
    if len(split) != 3 or not min(split) > 0 or not abs(sum(split) - 1) <= 1e-6:
        raise ConfigError(
            f"split must be three positive shares with sum 1, got {tuple(split)}; "
            f"the usual one is {DEFAULT_SPLIT}"
        )
    test_rows = int(num_rows * split[2])
    return Borders(
        train_end=int(num_rows * split[0]), validation_end=num_rows - test_rows, test_end=num_rows
    )


def check_rows(
    borders: Borders,
    *,
    path: str,
    context_length: int,
    prediction_length: int,
    fits: bool,
) -> None:
    """Refuse a table that is too short for one window in a part that is needed.

    Args:
        fits: whether something is fitted, so that train and validation need a window as well.

    Raises:
        DataError: with the rows needed and the rows there, for each part.
    """
    train = borders.train_end
    validation = borders.validation_end - borders.train_end
    test = borders.test_end - borders.validation_end
    needs = [("test", prediction_length, test), ("before test", context_length, train + validation)]
    if fits:
        needs += [
            ("train", context_length + prediction_length, train),
            ("validation", prediction_length, validation),
        ]
    if any(needed > there for _, needed, there in needs):
        numbers = ", ".join(
            f"{part}: {needed} needed, {there} there" for part, needed, there in needs
        )
        raise DataError(
            f"{path}: too few rows for context {context_length} and horizon {prediction_length} "
            f"({numbers}); shorten them, change the split or give a longer table"
        )


def fit_scaler(values_LC: np.ndarray, variates: tuple[str, ...], *, path: str) -> Scaler:
    """Fit the scaler on the rows of the train part; points that are not observed do not count.

    A variate that is constant there gets the standard deviation 1, as in scikit-learn, and a
    warning: its errors are in the unit of the table.

    Raises:
        DataError: if a variate has no observed point.
    """
    observed_LC = np.isfinite(values_LC)
    empty = [name for name, seen in zip(variates, observed_LC.any(axis=0), strict=True) if not seen]
    if empty:
        raise DataError(
            f"{path}: no observed value in the train part ({len(values_LC)} rows) of "
            f"{', '.join(empty)}; leave these columns out or change the split"
        )
    exact_LC = np.where(observed_LC, values_LC, np.nan).astype(np.float64)
    mean_C, std_C = np.nanmean(exact_LC, axis=0), np.nanstd(exact_LC, axis=0)
    # Rounding may leave a tiny deviation on a constant column: compare the extremes instead.
    is_constant_C = np.nanmax(exact_LC, axis=0) == np.nanmin(exact_LC, axis=0)
    if is_constant_C.any():
        constant = [name for name, is_one in zip(variates, is_constant_C, strict=True) if is_one]
        logger.warning(
            "%s: constant in the train part, so scaled by 1: %s", path, ", ".join(constant)
        )
    return Scaler(mean_C=mean_C, std_C=np.where(is_constant_C, 1.0, std_C))


def iterate_windows(
    values_LC: np.ndarray,
    *,
    first_target: int,
    end: int,
    context_length: int,
    prediction_length: int,
    block_size: int = 256,
    places_B: np.ndarray | None = None,
) -> Iterator[WindowBlock]:
    """Yield, in order, all windows whose targets lie in rows [first_target, end).

    The context may begin before `first_target`. Windows overlap and are copied block by block:
    no block holds more than `block_size` windows or about `MAX_BLOCK_VALUES` values.

    Args:
        first_target: first row of the part; at least `context_length`.
        places_B: yield these windows only (0 is the first one). For fitting: an evaluation that
            skips windows is not this protocol.
    """
    assert first_target >= context_length, "check_rows comes before the windows"
    length = context_length + prediction_length
    part_LC = values_LC[first_target - context_length : end]
    if len(part_LC) < length:
        return
    windows_BCW = np.lib.stride_tricks.sliding_window_view(part_LC, length, axis=0)
    if places_B is None:
        places_B = np.arange(len(windows_BCW))
    per_block = max(1, min(block_size, MAX_BLOCK_VALUES // (values_LC.shape[1] * length)))
    for first in range(0, len(places_B), per_block):
        block_B = places_B[first : first + per_block]
        yield WindowBlock(
            first=first,
            context_BCL=np.ascontiguousarray(windows_BCW[block_B, :, :context_length]),
            target_BCQ=np.ascontiguousarray(windows_BCW[block_B, :, context_length:]),
        )


def _ett_borders(path: str, num_rows: int, *, month_rows: int) -> Borders:
    borders = Borders(
        train_end=12 * month_rows, validation_end=16 * month_rows, test_end=20 * month_rows
    )
    if num_rows < borders.test_end:
        raise DataError(
            f"{path}: the ETT borders need {borders.test_end} rows, {num_rows} are there; "
            "give the whole file, or a split such as 0.7,0.1,0.2"
        )
    return borders
