"""The same two series in the format of every source that has one of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from data_pipeline.sources import (
    GluontsSource,
    JsonlSource,
    NpySource,
    SavedSource,
    SyntheticSource,
    Time300bSource,
    TsfSource,
)

EXPECTED = np.array([[1, 2, np.nan, 4], [8, 7, 6, 5]], np.float32)


def npy_example(folder: Path) -> NpySource:
    np.save(folder / "data.npy", EXPECTED.T)
    return NpySource(path="data.npy")


def time300b_example(folder: Path) -> Time300bSource:
    leaf = folder / "corpus" / "web" / "visits"
    leaf.mkdir(parents=True)
    values = EXPECTED.ravel()
    values[:3].tofile(leaf / "data-1-of-2.bin")
    values[3:].tofile(leaf / "data-2-of-2.bin")
    meta = {
        "num_sequences": 2,
        "dtype": "float32",
        "files": {"data-1-of-2.bin": 3, "data-2-of-2.bin": 5},
        "scales": [{"offset": 0, "length": 4}, {"offset": 4, "length": 4}],
    }
    (leaf / "meta.json").write_text(json.dumps(meta))
    return Time300bSource(path="corpus")


def tsf_example(folder: Path) -> TsfSource:
    lines = ["@attribute series_name string", "@data", "T1:1,2,?,4", "T2:8,7,6,5"]
    (folder / "data.tsf").write_text("\n".join(lines) + "\n")
    return TsfSource(path="data.tsf")


def jsonl_example(folder: Path) -> JsonlSource:
    lines = ['{"sequence": [1, 2, null, 4]}', '{"target": [8, 7, 6, 5]}']
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return JsonlSource(path="data.jsonl")


def gluonts_example(folder: Path) -> GluontsSource:
    batch = pa.record_batch({"target": pa.array(list(EXPECTED)), "start": [None, None]})
    with pa.ipc.new_file(str(folder / "data.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    return GluontsSource(path="data.arrow")


def saved_example(folder: Path) -> SavedSource:
    datasets.Dataset.from_dict({"target": list(EXPECTED)}).save_to_disk(str(folder / "saved"))
    return SavedSource(path="saved")


def synthetic_example(folder: Path) -> SyntheticSource:
    return SyntheticSource(num_series=2, min_length=40, max_length=60)


FORMAT_EXAMPLES: dict[type, Callable[[Path], object]] = {
    NpySource: npy_example,
    Time300bSource: time300b_example,
    TsfSource: tsf_example,
    JsonlSource: jsonl_example,
    GluontsSource: gluonts_example,
    SavedSource: saved_example,
    SyntheticSource: synthetic_example,
}
