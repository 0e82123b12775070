"""The table of a run: read, split, scaled by its train part, targets first and covariates behind.

Shapes: C variates, L rows.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data_pipeline.table import Table, read_table
from tsmoe.errors import ConfigError, DataError
from tsmoe.evaluate.protocol import Borders, check_rows, fit_scaler, ltsf_borders
from tsmoe.finetune.config import TableConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """What windows are cut from."""

    table: Table
    """In the unit of the file."""
    borders: Borders
    scaled_LC: NDArray[np.float32]
    """Each variate standardised by the train part; NaN where not observed."""
    num_targets: int
    """First variates, which are forecast."""
    num_known_future: int
    """Last variates, whose values are known for the steps to forecast."""

    @property
    def num_variates(self) -> int:
        """Targets and covariates."""
        return self.scaled_LC.shape[1]

    @property
    def num_covariates(self) -> int:
        """Variates behind the targets."""
        return self.num_variates - self.num_targets

    @property
    def fingerprint(self) -> str:
        """Hash of all values and names: equal where the same numbers are learned from."""
        digest = hashlib.sha256(repr((self.table.variates, self.borders)).encode())
        digest.update(np.ascontiguousarray(self.scaled_LC).tobytes())
        return digest.hexdigest()


def open_table(config: TableConfig, *, context_length: int) -> SplitTable:
    """Read and split a table.

    Raises:
        ConfigError: if a column is named that is not there.
        DataError: if there are too few rows, or nothing is observed of a variate.
    """
    covariates = config.covariates_in_order
    table = read_table(
        config.path,
        time_column=config.time_column,
        columns=None if config.targets is None else [*config.targets, *covariates],
        columns_option="table.targets",
        ignores_time=config.ignores_time,
    )
    if config.targets is None and covariates:
        table = _with_last(table, covariates)
    num_rows = len(table.values_LC)
    borders = ltsf_borders(table.path, num_rows, split=config.split)
    check_rows(
        borders,
        path=table.path,
        context_length=context_length,
        prediction_length=config.prediction_length,
        fits=True,
    )
    scaler = fit_scaler(table.values_LC[: borders.train_end], table.variates, path=table.path)
    num_targets = len(table.variates) - len(covariates)
    for part, first, end in (
        ("train", 0, borders.train_end),
        ("validation", borders.train_end, borders.validation_end),
        ("test", borders.validation_end, borders.test_end),
    ):
        is_seen_C = np.isfinite(table.values_LC[first:end, :num_targets]).any(axis=0)
        if not is_seen_C.any():
            raise DataError(
                f"{table.path}: no target has an observed value in the {part} part (rows {first} "
                f"to {end}); change table.split or table.targets"
            )
        unseen = [table.variates[place] for place in np.flatnonzero(~is_seen_C)]
        if unseen:
            logger.warning(
                "%s: %s: no observed value in the %s part (rows %d to %d), which tells nothing",
                table.path, ", ".join(unseen[:20]), part, first, end,
            )  # fmt: skip
    return SplitTable(
        table=table,
        borders=borders,
        scaled_LC=scaler.scale(table.values_LC),
        num_targets=num_targets,
        num_known_future=len(config.known_future),
    )


def _with_last(table: Table, covariates: list[str]) -> Table:
    """Order variates so that covariates stand behind all others."""
    for name in covariates:
        if name not in table.variates:
            raise ConfigError(
                f"table.covariates: {table.path} has no column {name!r}; columns there: "
                f"{', '.join(table.variates[:20])}"
            )
    targets = [name for name in table.variates if name not in covariates]
    if not targets:
        raise ConfigError(f"table.covariates: all columns of {table.path}; leave one to forecast")
    order = [table.variates.index(name) for name in (*targets, *covariates)]
    return replace(
        table, variates=(*targets, *covariates), values_LC=table.values_LC[:, order].copy()
    )
