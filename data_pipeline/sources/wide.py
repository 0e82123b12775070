"""A wide table as a source: one series per variate."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.record import SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource
from data_pipeline.table import read_table


def wide_records(
    file: Path,
    config: FileSource,
    *,
    time_column: str | None,
    columns: Sequence[str] | None,
    time_zone: str | None,
) -> Iterator[SeriesRecord]:
    """Yield the variates of one wide file, named after the file and the column.

    Raises:
        DataError: naming file, column and row, if there is anything to guess.
    """
    table = read_table(
        file, time_column=time_column, columns=columns, time_zone=time_zone, is_strict=True
    )
    stamps = table.timestamps
    for variate, name in enumerate(table.variates):
        yield SeriesRecord(
            item_id=f"{file.stem}_{name}",
            start=None if stamps is None else stamps[0].item(),
            end=None if stamps is None else stamps[-1].item(),
            freq=config.freq or table.freq,
            domain=config.domain or UNKNOWN_DOMAIN,
            source=config.source or file.stem,
            variate=variate,
            values=table.values_LC[:, variate],
        )
