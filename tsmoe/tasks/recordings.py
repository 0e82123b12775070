"""Reading recordings that nobody has labelled, for a detector that is trained already.

L rows of the file   C variates
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.table import is_numeric
from data_pipeline.table_file import read_columns
from tsmoe.errors import ConfigError, DataError
from tsmoe.tasks.anomaly_data import ENTITY_NAMES, find_time, first_of, read_entities, read_time
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

    Entities and the time are found as in `read_anomaly_data`; without a column of entities all rows
    are of one, named after the file.

    Raises:
        ConfigError: if an option names a column that is not there.
        DataError: for everything that is wrong with the file.
    """
    path = Path(path)
    table = read_columns(path)
    for option, name in (("entity_column", entity_column), ("time_column", time_column)):
        if name is not None and name not in table.column_names:
            raise ConfigError(
                f"{option}: {path} has no column {name!r}; columns there: "
                f"{listed(table.column_names)}"
            )
    require_columns(table, variates, path)
    values_LC = np.empty((table.num_rows, len(variates)), np.float32)
    for place, name in enumerate(variates):
        column = table.column(name)
        if not is_numeric(column.type):
            raise DataError(f"{path}, column {name!r}: {column.type} values are no numbers")
        values_LC[:, place] = column.cast(pa.float32(), safe=False).to_numpy()
    if np.isinf(values_LC).any():
        row, place = np.argwhere(np.isinf(values_LC))[0]
        raise DataError(
            f"{path}, column {variates[place]!r}, row {row + 1}: infinite or beyond float32; leave "
            "the cell empty if the value is missing"
        )
    rest = [name for name in table.column_names if name not in variates and name != entity_column]
    entity = entity_column or first_of(ENTITY_NAMES, rest)
    rest = [name for name in rest if name != entity]
    time = time_column or find_time(table, rest, path)
    order_L = np.arange(table.num_rows)
    if time is not None:
        order_L = np.argsort(read_time(table, time, path), kind="stable")
    names, entity_L = read_entities(table, entity, path)
    return Recordings(
        path=str(path),
        named={name: table.column(name) for name in (entity, time) if name is not None},
        values_LC=values_LC,
        entities=names,
        rows=tuple(order_L[entity_L[order_L] == number] for number in range(len(names))),
    )
