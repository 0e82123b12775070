"""One recorded series, and the Arrow layout in which the corpus store keeps many of them.

The only file that knows the column names of the store. A record batch holds its values in one
contiguous float32 buffer, so that readers can slice windows out of a memory map without copying.
"""

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.steps.split import train_length

SCHEMA = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("start", pa.timestamp("us")),
        pa.field("end", pa.timestamp("us")),
        pa.field("freq", pa.string()),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("variate", pa.int32(), nullable=False),
        pa.field("target", pa.large_list(pa.float32()), nullable=False),
        pa.field("observed_fraction", pa.float32(), nullable=False),
        pa.field("mean", pa.float64()),
        pa.field("std", pa.float64()),
    ]
)
"""Columns of a shard. `mean` and `std` are over the observed points of the training part."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesRecord:
    """One univariate series as it was recorded."""

    item_id: str
    start: dt.datetime | None
    """Time of the first point; None where the series has no usable calendar."""
    end: dt.datetime | None
    freq: str | None
    """pandas alias of the sampling interval, such as "15min" or "MS"; None if it has no alias."""
    domain: str
    source: str
    """Name of the data set the series belongs to; sampling weights and statistics go by it."""
    variate: int
    """Position among the variates of the same recording; 0 for a series that stands alone."""
    values: np.ndarray
    """float32, one axis, in time order; NaN means not observed."""


@dataclass(frozen=True, kw_only=True)
class Drop:
    """A series that does not enter the corpus, and why."""

    item_id: str
    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What one series looks like: share of observed points, location and scale for training."""

    observed_fraction: float
    mean: float
    std: float


def series_statistics(values: np.ndarray, train_fraction: float) -> Statistics:
    """Measure one series; mean and std see its training part only, and are NaN if that is empty."""
    training = values[: train_length(len(values), train_fraction)]
    observed = training[~np.isnan(training)]
    has_points = observed.size > 0
    return Statistics(
        observed_fraction=1.0 - float(np.isnan(values).mean()),
        mean=float(observed.mean(dtype=np.float64)) if has_points else float("nan"),
        std=float(observed.std(dtype=np.float64)) if has_points else float("nan"),
    )


class SeriesBatch:
    """The series of one shard as an Arrow record batch.

    Args:
        batch: rows in `SCHEMA`, as read from a shard.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch

    @classmethod
    def from_records(
        cls, records: Sequence[SeriesRecord], values: np.ndarray, *, train_fraction: float
    ) -> "SeriesBatch":
        """Lay records out as one batch, without copying their values.

        Args:
            records: the rows, in the order in which their values stand in `values`.
            values: float32, all series one after another.
            train_fraction: share of each series that `mean` and `std` may see.
        """
        lengths = np.array([len(record.values) for record in records], dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        statistics = [series_statistics(record.values, train_fraction) for record in records]
        columns: dict[str, Any] = {  # Any: lists, and one Arrow array
            "item_id": [record.item_id for record in records],
            "start": [record.start for record in records],
            "end": [record.end for record in records],
            "freq": [record.freq for record in records],
            "domain": [record.domain for record in records],
            "source": [record.source for record in records],
            "variate": [record.variate for record in records],
            "target": pa.LargeListArray.from_arrays(offsets, pa.array(values)),
            "observed_fraction": [item.observed_fraction for item in statistics],
            "mean": [item.mean for item in statistics],
            "std": [item.std for item in statistics],
        }
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for field, column in ((field, columns[field.name]) for field in SCHEMA)
        ]
        return cls(pa.record_batch(arrays, schema=SCHEMA))

    def __len__(self) -> int:
        return self.batch.num_rows

    @cached_property
    def values(self) -> np.ndarray:
        """All values of the batch, one series after another: a view, not a copy."""
        return self.batch.column("target").values.to_numpy(zero_copy_only=True)

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 of one more than the rows: series i is `values[offsets[i]:offsets[i + 1]]`."""
        return self.batch.column("target").offsets.to_numpy(zero_copy_only=True)

    @property
    def item_ids(self) -> pa.Array:
        """Names of the series, as an Arrow array."""
        return self.batch.column("item_id")

    @property
    def sources(self) -> pa.DictionaryArray:
        """Source of each series, dictionary encoded."""
        return self.batch.column("source").dictionary_encode()

    @property
    def domains(self) -> pa.DictionaryArray:
        """Domain of each series, dictionary encoded."""
        return self.batch.column("domain").dictionary_encode()

    @property
    def observed_fractions(self) -> np.ndarray:
        """Share of points of each series that were observed, float32."""
        return self.batch.column("observed_fraction").to_numpy()

    def series(self, row: int) -> np.ndarray:
        """Values of one series, a view."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def record(self, row: int) -> SeriesRecord:
        """One series with all that is known of it; its values are a view."""
        cells = {
            name: self.batch.column(name)[row].as_py()
            for name in ("item_id", "start", "end", "freq", "domain", "source", "variate")
        }
        return SeriesRecord(**cells, values=self.series(row))

    def statistics(self, row: int) -> Statistics:
        """Stored statistics of one series."""
        cells = {
            name: self.batch.column(name)[row].as_py()
            for name in ("observed_fraction", "mean", "std")
        }
        return Statistics(**cells)
