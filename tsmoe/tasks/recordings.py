"""Reading recordings that nobody has labelled, for a detector that is trained already.

L rows of the file   C variates
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.table_file import read_columns
from tsmoe.errors import ConfigError
from tsmoe.tasks.anomaly_data import read_entities, read_numbers, read_time
from tsmoe.tasks.task_file import listed, require_columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Recordings:
    """Rows of a file, in its order."""

    path: str
    named: dict[str, pa.ChunkedArray]
    """The columns of entities and times, where there are any."""
    values_LC: np.ndarray
    """float32; NaN where not observed."""
    entities: tuple[str, ...]
    """Names, as they first appear."""
    rows: tuple[np.ndarray, ...]
    """Of each entity, its rows in the order of time."""


def read_recordings(
    path: str | Path,
    variates: Sequence[str],
    *,
    entity_column: str | None = None,
    time_column: str | None = None,
) -> Recordings:
    """Read what was recorded of some variates; other columns, such as labels, are ignored.

    Args:
        path: a table, Parquet or CSV, one row per entity and time.
        variates: columns to read, in this order.
        entity_column: None if all rows are of one entity, which is named after the file.
        time_column: what rows are sorted by; None to take them as they stand.

    Raises:
        ConfigError: if a column of entities or times is not there, or is a variate.
        DataError: for everything that is wrong with the file.
    """
    path = Path(path)
    table = read_columns(path)
    for option, name in (("entity column", entity_column), ("time column", time_column)):
        if name is not None and name not in table.column_names:
            raise ConfigError(
                f"{path} has no {option} {name!r}; columns there: {listed(table.column_names)}; "
                f"--{option.replace(' ', '-')} names another"
            )
        if name in variates or (name is not None and entity_column == time_column):
            raise ConfigError(f"{option}: {name!r} is something else already; name another")
    require_columns(table, variates, path)
    values_LC = read_numbers(table, variates, path)
    order_L = np.arange(table.num_rows)
    if time_column is not None:
        order_L = np.argsort(read_time(table, time_column, path), kind="stable")
    names, entity_L = read_entities(table, entity_column, path)
    return Recordings(
        path=str(path),
        named={name: table.column(name) for name in (entity_column, time_column) if name},
        values_LC=values_LC,
        entities=names,
        rows=tuple(order_L[entity_L[order_L] == number] for number in range(len(names))),
    )
