"""What sources of tables share: wide, one column per variate; long, one row per series and time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.long import long_records
from data_pipeline.sources.long_columns import find_long_columns
from data_pipeline.sources.wide import wide_records
from data_pipeline.table_batches import open_table_batches


@dataclass(frozen=True, kw_only=True)
class TableSource(FileSource):
    """Files with one row per time, and how to read their columns."""

    time_column: str | None = None
    """Name of the time column of a wide or long file; found by itself if not given."""
    columns: tuple[str, ...] | None = None
    """Variates to take from a wide or long file; all if not given."""
    id_columns: tuple[str, ...] | None = None
    """Columns of a long file that together tell its series apart; if not given, the first called
    item_id, unique_id, series, series_id, entity or id."""
    time_zone: str | None = None
    """Zone that times without one are local to, such as "Europe/Rome" or "UTC"; records are in UTC.
    If not given they are taken as they stand, and refused where a clock was changed."""

    def __post_init__(self) -> None:
        if self.time_zone is not None:
            try:
                ZoneInfo(self.time_zone)
            except (ZoneInfoNotFoundError, ValueError) as error:
                raise ValueError(
                    f"time_zone: there is no zone {self.time_zone!r}; names are like 'Europe/Rome'"
                ) from error
        for name in ("columns", "id_columns"):
            names = getattr(self, name)
            if names is not None and len(set(names)) != max(1, len(names)):
                raise ValueError(f"{name}: {list(names)} is empty or has a name twice")

    def table_records(
        self, file: Path, layout: Literal["auto", "wide", "long"]
    ) -> Iterator[SeriesRecord | Drop]:
        """Yield all series of a table.

        Raises:
            ConfigError: if an option does not fit the file.
            DataError: if the file cannot be read without guessing.
        """
        if layout != "wide":
            table = open_table_batches(file)
            long = find_long_columns(
                table,
                id_columns=self.id_columns,
                time_column=self.time_column,
                columns=self.columns,
                is_required=layout == "long" or self.id_columns is not None,
            )
            if long is not None:
                yield from long_records(table, long, self, time_zone=self.time_zone)
                return
        yield from wide_records(
            file,
            self,
            time_column=self.time_column,
            columns=self.columns,
            time_zone=self.time_zone,
        )
