"""Parquet files: one series per row, one column per variate, or one row per series and time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from data_pipeline.errors import ConfigError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.row_files import ParquetRows, open_parquet, parquet_errors
from data_pipeline.sources.rows import TARGET, RowReader
from data_pipeline.sources.tables import TableSource
from data_pipeline.sources.unit import Unit


@dataclass(frozen=True, kw_only=True)
class ParquetSource(TableSource):
    """One or many Parquet files."""

    type: Literal["parquet"] = "parquet"
    layout: Literal["auto", "series", "wide", "long"] = "auto"
    """`series`: one series per row, values in the list column `target`, read in small batches;
    `wide`: one row per time, one column per variate, read whole; `long`: one row per series and
    time; `auto`: `series` if the column `target` holds lists, `long` if a column called item_id,
    unique_id, series, series_id, entity or id holds text and times repeat, else `wide`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout == "series" and self._table_options():
            raise ValueError(
                f"time_column and columns are for layout: wide or long, but layout is series; "
                f"leave out {', '.join(self._table_options())}"
            )
        if self.layout == "wide" and self.id_columns is not None:
            raise ValueError("id_columns are for layout: long, but layout is wide")

    def units(self) -> tuple[Unit, ...]:
        """Cut files with one series per row into groups of row groups; others are one unit each."""
        units: list[Unit] = []
        for file in self.files():
            if self._has_series(file):
                units += ParquetRows(file).units()
            else:
                units.append(Unit(file=str(file), size_bytes=file.stat().st_size))
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield all series of a unit; unnamed ones are called after the file and their row in it.

        Raises:
            DataError: if the file cannot be read; one series that cannot is a `Drop`.
        """
        file = Path(unit.file)
        if self.layout != "series" and not self._has_series(file):
            yield from self.table_records(file, self.layout)
            return
        reader = RowReader(
            where=str(file),
            name=file.stem,
            domain=self.domain,
            source=self.source,
            freq=self.freq,
        )
        for reader.first_row, batch in ParquetRows(file).batches(unit.part):
            yield from reader.read(batch)

    def _has_series(self, file: Path) -> bool:
        """Tell whether a file has one series per row."""
        if self.layout != "auto":
            return self.layout == "series"
        with open_parquet(file) as opened, parquet_errors(file):
            schema = opened.schema_arrow
            has_lists = TARGET in schema.names and pa.types.is_nested(schema.field(TARGET).type)
        if has_lists and self._table_options():
            raise ConfigError(
                f"{', '.join(self._table_options())} are for wide files and long ones, but {file} "
                f"has one series per row"
            )
        return has_lists

    def _table_options(self) -> list[str]:
        """Name the options for tables that are set."""
        names = ("time_column", "columns", "id_columns", "time_zone")
        return [name for name in names if getattr(self, name) is not None]
