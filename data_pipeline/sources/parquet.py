"""Parquet files, with one series per row or with one column per variate."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import FileSource
from data_pipeline.sources.rows import TARGET, RowReader
from data_pipeline.sources.unit import Unit
from data_pipeline.sources.wide import wide_records

_READ_BYTES = 2**20
_ROWS_AT_ONCE = 64
"""Rows are whole series, of up to millions of points each."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource(FileSource):
    """One or many Parquet files."""

    type: Literal["parquet"] = "parquet"
    layout: Literal["auto", "series", "wide"] = "auto"
    """`series`: one series per row, values in the list column `target`, read in small batches;
    `wide`: one row per time, read whole; `auto`: `series` if the column `target` holds lists."""
    time_column: str | None = None
    """Name of the time column of a wide file; found by itself if not given."""
    columns: tuple[str, ...] | None = None
    """Variates to take from a wide file; all if not given."""

    def __post_init__(self) -> None:
        if self.layout == "series" and (self.time_column or self.columns):
            raise ValueError("time_column and columns are for layout: wide, but layout is series")

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield all series of a file."""
        file = Path(unit.file)
        if self._is_wide(file):
            yield from wide_records(file, self, time_column=self.time_column, columns=self.columns)
        else:
            yield from self._series(file)

    def _is_wide(self, file: Path) -> bool:
        if self.layout != "auto":
            return self.layout == "wide"
        schema = _open(file).schema_arrow
        has_lists = TARGET in schema.names and pa.types.is_nested(schema.field(TARGET).type)
        if has_lists and (self.time_column or self.columns):
            raise ConfigError(
                f"time_column and columns are for wide files, but {file} has one series per row"
            )
        return not has_lists

    def _series(self, file: Path) -> Iterator[SeriesRecord | Drop]:
        reader = RowReader(
            where=str(file),
            name=file.stem,
            domain=self.domain,
            source=self.source,
            freq=self.freq,
        )
        try:
            for batch in _open(file).iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from reader.read(batch)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error


def _open(file: Path) -> pq.ParquetFile:
    try:
        # Read and decode in small pieces; the default loads a row group, often the whole file.
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{file}: cannot be read as Parquet ({reason}); copy or export it again")
