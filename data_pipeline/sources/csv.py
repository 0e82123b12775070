"""CSV files, with one column per variate, or one row per series and time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.tables import TableSource
from data_pipeline.sources.unit import Unit


@dataclass(frozen=True, kw_only=True)
class CsvSource(TableSource):
    """One or many CSV files, separated by comma, semicolon or tab, in UTF-8."""

    type: Literal["csv"] = "csv"
    layout: Literal["auto", "wide", "long"] = "auto"
    """`wide`: one row per time, one column per variate, read whole; `long`: one row per series and
    time; `auto`: `long` if a column called item_id, unique_id, series, series_id, entity or id
    holds text and times repeat, else `wide`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout == "wide" and self.id_columns is not None:
            raise ValueError("id_columns are for layout: long, but layout is wide")

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield the series of a file.

        Raises:
            DataError: naming file, column and row, if there is anything to guess.
        """
        yield from self.table_records(Path(unit.file), self.layout)
