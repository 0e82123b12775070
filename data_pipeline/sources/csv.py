"""Wide CSV files: one row per time, one column per variate."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.unit import Unit
from data_pipeline.sources.wide import wide_records


@dataclass(frozen=True, kw_only=True)
class CsvSource(FileSource):
    """One or many wide CSV files."""

    type: Literal["csv"] = "csv"
    time_column: str | None = None
    """Name of the time column; found by itself if not given."""
    columns: tuple[str, ...] | None = None
    """Variates to take; all if not given."""

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield one series per variate of a file."""
        file = Path(unit.file)
        yield from wide_records(file, self, time_column=self.time_column, columns=self.columns)
