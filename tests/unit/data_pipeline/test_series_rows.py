import datetime as dt

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.rows import RowReader


def read(columns: dict, **names: object) -> list[SeriesRecord | Drop]:
    reader = RowReader(where="here", name="file", **names)
    return list(reader.read(pa.record_batch(columns)))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float32()),
        pa.large_list(pa.float64()),
        pa.list_(pa.float32(), 3),
        pa.list_(pa.int16()),
    ],
)
def test_every_list_type_gives_float32_with_nan_for_null(kind) -> None:
    first, second = read({"target": pa.array([[1, None, 3], [4, 5, 6]], kind)})
    assert first.values.dtype == np.float32
    np.testing.assert_array_equal(first.values, np.array([1, np.nan, 3], np.float32))
    np.testing.assert_array_equal(second.values, [4, 5, 6])


def test_slice_of_a_batch_reads_its_own_values() -> None:
    batch = pa.record_batch({"target": pa.array([[1, 2], [3], [4, 5]], pa.list_(pa.float32()))})
    records = list(RowReader(where="here", name="file").read(batch.slice(1, 2)))
    assert [record.values.tolist() for record in records] == [[3.0], [4.0, 5.0]]


def test_nested_lists_are_variates() -> None:
    first, second = read({"item_id": ["a"], "target": pa.array([[[1.0, 2.0], [3.0, 4.0]]])})
    assert [first.variate, second.variate] == [0, 1]
    assert first.item_id == second.item_id == "a"
    assert second.values.tolist() == [3.0, 4.0]


def test_cells_without_numbers_are_drops() -> None:
    (drop,) = read({"item_id": ["a"], "target": pa.array([["x", "y"]])})
    assert drop == Drop(item_id="a", source="file", reason="not_numeric")
    kept, dropped = read({"target": pa.array([[1.0], None])})
    assert isinstance(kept, SeriesRecord)
    assert dropped == Drop(item_id="file_1", source="file", reason="not_numeric")
    (nested,) = read({"target": pa.array([[[1.0], None]])})
    assert nested.reason == "not_numeric"
    (plain,) = read({"target": pa.array([3.0])})
    assert plain.reason == "not_numeric"


def test_times_may_be_null_text_or_stamps() -> None:
    target = pa.array([[1.0]] * 4)
    start = ["2020-01-02 03:00", None, "", "2020-01-02T03:00:00+01:00"]
    end = pa.array([dt.datetime(2020, 1, 2)] * 4, pa.timestamp("ns"))
    records = read({"target": target, "start": start, "end": end})
    hours = [record.start for record in records]
    assert hours == [dt.datetime(2020, 1, 2, 3), None, None, dt.datetime(2020, 1, 2, 2)]
    assert records[0].end == dt.datetime(2020, 1, 2)
    (drop,) = read({"target": pa.array([[1.0]]), "start": ["yesterday-ish"]})
    assert drop.reason == "bad_timestamp"


@pytest.mark.parametrize(
    ("columns", "names", "expected"),
    [
        ({"item_id": ["Health_MotorImagery_12_3"]}, {}, ("Health", "MotorImagery")),
        ({"item_id": ["anything_1"]}, {}, ("unspecified", "file")),
        ({"item_id": ["Energy_x_1"], "dataset": ["mill"]}, {}, ("Energy", "mill")),
        ({"item_id": ["Energy_x_1"], "domain": ["Web"], "source": ["mill"]}, {}, ("Web", "mill")),
        ({"dataset": ["mill"]}, {"domain": "IoT", "source": "mine"}, ("IoT", "mine")),
    ],
)
def test_domain_and_source_come_from_user_row_or_name(columns, names, expected) -> None:
    (record,) = read({**columns, "target": pa.array([[1.0]])}, **names)
    assert (record.domain, record.source) == expected


def test_freq_is_spelled_the_present_way_or_overridden() -> None:
    columns = {"target": pa.array([[1.0]]), "freq": ["15T"]}
    assert read(columns)[0].freq == "15min"
    assert read(columns, freq="h")[0].freq == "h"


def test_missing_target_lists_the_columns() -> None:
    with pytest.raises(DataError, match=r"here: no column 'target'.*item_id, value"):
        read({"item_id": ["a"], "value": [1.0]})
