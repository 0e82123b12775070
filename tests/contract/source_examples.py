"""The same two series in the format of every source, and in every layout of a table.

An example writes the series it is given and returns the source that reads them. A new source adds
one to EXAMPLES; all contract tests run over it, those of damaged files among them.
"""

import datetime as dt
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data_pipeline.sources import (
    CsvSource,
    GluontsSource,
    HubSource,
    JsonlSource,
    NpySource,
    ParquetSource,
    SavedSource,
    SyntheticSource,
    Time300bSource,
    TsfSource,
)

EXPECTED = np.array([[1, 2, np.nan, 4], [8, 7, 6, 5]], np.float32)

Example = Callable[..., object]
"""Called with a folder, and with two series of equal length, EXPECTED if none are given."""


def lists(values: np.ndarray) -> pa.Array:
    """Lists of numbers, of the precision of the values."""
    return pa.array(list(values), pa.list_(pa.from_numpy_dtype(values.dtype)))


def hours(count: int) -> list[dt.datetime]:
    return [dt.datetime(2020, 1, 1) + dt.timedelta(hours=hour) for hour in range(count)]


def wide_table(values: np.ndarray) -> pa.Table:
    first, second = values
    return pa.table({"date": hours(len(first)), "a": first, "b": second})


def long_table(values: np.ndarray) -> pa.Table:
    length = values.shape[1]
    return pa.table(
        {
            "unique_id": np.repeat(["first", "second"], length),
            "ds": hours(length) * 2,
            "y": values.ravel(),
        }
    )


def write_csv(table: pa.Table, file: Path) -> None:
    """Write NaN as an empty cell, which is how tables say that a value is missing."""
    columns = [
        pa.array(column.to_numpy(), from_pandas=True)
        if pa.types.is_floating(column.type)
        else column
        for column in table.columns
    ]
    pyarrow.csv.write_csv(pa.table(columns, names=table.column_names), file)


def write_arrow(table: pa.Table, file: Path, *, is_stream: bool) -> None:
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    file.parent.mkdir(parents=True, exist_ok=True)
    with make(str(file), table.schema) as writer:
        writer.write_table(table)


def csv_example(folder: Path, values: np.ndarray = EXPECTED) -> CsvSource:
    write_csv(wide_table(values), folder / "data.csv")
    return CsvSource(path="data.csv")


def long_csv_example(folder: Path, values: np.ndarray = EXPECTED) -> CsvSource:
    write_csv(long_table(values), folder / "data.csv")
    return CsvSource(path="data.csv", layout="long")


def parquet_example(folder: Path, values: np.ndarray = EXPECTED) -> ParquetSource:
    table = pa.table({"target": lists(values)})
    pq.write_table(table, folder / "data.parquet", write_page_checksum=True)
    return ParquetSource(path="data.parquet")


def wide_parquet_example(folder: Path, values: np.ndarray = EXPECTED) -> ParquetSource:
    pq.write_table(wide_table(values), folder / "data.parquet", write_page_checksum=True)
    return ParquetSource(path="data.parquet")


def long_parquet_example(folder: Path, values: np.ndarray = EXPECTED) -> ParquetSource:
    pq.write_table(long_table(values), folder / "data.parquet", write_page_checksum=True)
    return ParquetSource(path="data.parquet", layout="long")


def utsd_table(values: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "item_id": ["Web_wiki_0", "Web_wiki_1"],
            "start": hours(2),
            "freq": ["H", "H"],
            "target": lists(values),
        }
    )


def hub_example(folder: Path, values: np.ndarray = EXPECTED) -> HubSource:
    (folder / "copy").mkdir()
    pq.write_table(utsd_table(values), folder / "copy" / "data.parquet")
    return HubSource(path="copy")


def hub_stream_example(folder: Path, values: np.ndarray = EXPECTED) -> HubSource:
    write_arrow(utsd_table(values), folder / "copy" / "Web" / "data.arrow", is_stream=True)
    return HubSource(path="copy")


def hub_file_example(folder: Path, values: np.ndarray = EXPECTED) -> HubSource:
    write_arrow(utsd_table(values), folder / "copy" / "Web" / "data.arrow", is_stream=False)
    return HubSource(path="copy")


def npy_example(folder: Path, values: np.ndarray = EXPECTED) -> NpySource:
    np.save(folder / "data.npy", values.T)
    return NpySource(path="data.npy")


def time300b_example(folder: Path, values: np.ndarray = EXPECTED) -> Time300bSource:
    leaf = folder / "corpus" / "web" / "visits"
    leaf.mkdir(parents=True)
    flat = values.astype(np.float32).ravel()
    length, cut = values.shape[1], len(flat) // 2 - 1
    flat[:cut].tofile(leaf / "data-1-of-2.bin")
    flat[cut:].tofile(leaf / "data-2-of-2.bin")
    meta = {
        "num_sequences": 2,
        "dtype": "float32",
        "files": {"data-1-of-2.bin": cut, "data-2-of-2.bin": len(flat) - cut},
        "scales": [{"offset": 0, "length": length}, {"offset": length, "length": length}],
    }
    (leaf / "meta.json").write_text(json.dumps(meta))
    return Time300bSource(path="corpus")


def texts(values: np.ndarray, missing: str) -> Sequence[str]:
    """Each series with commas between its numbers."""
    return [
        ",".join(missing if np.isnan(value) else repr(float(value)) for value in series)
        for series in values
    ]


def tsf_example(folder: Path, values: np.ndarray = EXPECTED) -> TsfSource:
    lines = [f"T{number}:{text}" for number, text in enumerate(texts(values, "?"), start=1)]
    lines = ["@attribute series_name string", "@data", *lines]
    (folder / "data.tsf").write_text("\n".join(lines) + "\n")
    return TsfSource(path="data.tsf")


def jsonl_example(folder: Path, values: np.ndarray = EXPECTED) -> JsonlSource:
    first, second = (text.replace("inf", "Infinity") for text in texts(values, "null"))
    lines = [f'{{"sequence": [{first}]}}', f'{{"target": [{second}]}}']
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return JsonlSource(path="data.jsonl")


def gluonts_example(folder: Path, values: np.ndarray = EXPECTED) -> GluontsSource:
    table = pa.table({"target": lists(values), "start": pa.nulls(2)})
    write_arrow(table, folder / "data.arrow", is_stream=False)
    return GluontsSource(path="data.arrow")


def saved_example(folder: Path, values: np.ndarray = EXPECTED) -> SavedSource:
    datasets.Dataset.from_dict({"target": list(values)}).save_to_disk(str(folder / "saved"))
    return SavedSource(path="saved")


def synthetic_example(folder: Path) -> SyntheticSource:
    return SyntheticSource(num_series=2, min_length=40, max_length=60)


EXAMPLES: dict[type, Example] = {
    CsvSource: csv_example,
    ParquetSource: parquet_example,
    HubSource: hub_example,
    NpySource: npy_example,
    Time300bSource: time300b_example,
    TsfSource: tsf_example,
    JsonlSource: jsonl_example,
    GluontsSource: gluonts_example,
    SavedSource: saved_example,
    SyntheticSource: synthetic_example,
}

LAYOUT_EXAMPLES: dict[str, Example] = {
    "csv long": long_csv_example,
    "parquet wide": wide_parquet_example,
    "parquet long": long_parquet_example,
    "hub arrow stream": hub_stream_example,
    "hub arrow file": hub_file_example,
}
"""Further layouts of sources that have several; damage is done to these as well."""
