import datetime as dt

import numpy as np
import pytest

from data_pipeline.record import SCHEMA, SeriesBatch, series_statistics
from data_pipeline.steps.split import train_length


def test_train_length_rounds_down_and_is_exact_where_floats_are_not() -> None:
    assert train_length(39, 0.9) == 35
    assert train_length(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    assert train_length(7, 1.0) == 7
    np.testing.assert_array_equal(train_length(np.array([10, 39, 0]), 0.9), [9, 35, 0])


def test_statistics_see_the_observed_points_of_the_training_part_only() -> None:
    values = np.array([1, np.nan, 3, 5, 1000], np.float32)
    statistics = series_statistics(values, 0.8)
    assert statistics.mean == pytest.approx(3.0)
    assert statistics.std == pytest.approx(np.std([1, 3, 5]))
    assert statistics.observed_fraction == pytest.approx(0.8)


def test_batch_returns_the_records_it_was_made_of(make_record) -> None:
    start = dt.datetime(2020, 1, 31, 5)
    records = [
        make_record([1, np.nan, 3], item_id="x", start=start, end=start, freq=None, variate=2),
        make_record([7], item_id="y", domain="Web", source="wiki"),
    ]
    values = np.concatenate([record.values for record in records])
    batch = SeriesBatch.from_records(records, values, train_fraction=0.9)

    assert batch.batch.schema.equals(SCHEMA)
    assert np.shares_memory(batch.values, values)
    for row, record in enumerate(records):
        found = batch.record(row)
        np.testing.assert_array_equal(found.values, record.values)
        for name in ("item_id", "start", "end", "freq", "domain", "source", "variate"):
            assert getattr(found, name) == getattr(record, name)
