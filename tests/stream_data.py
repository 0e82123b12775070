"""A data set in the layout of UTSD on the hub, for tests of streaming."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILES = 6
NUM_SERIES = 24


def write_stream(folder: Path, *, is_random: bool = False) -> Path:
    """Write series i as 1000 * i + step, of 100 + 10 * i steps, into some files.

    A model sees no difference between these; random ones show in the losses which came when.
    """
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for file in range(FILES):
        numbers = range(file, NUM_SERIES, FILES)
        rows = {
            "item_id": [f"Web_set_{number}" for number in numbers],
            "freq": ["H"] * len(numbers),
            "target": [
                generator.normal(size=100 + 10 * number).astype(np.float32)
                if is_random
                else np.arange(100 + 10 * number, dtype=np.float32) + 1000 * number
                for number in numbers
            ],
        }
        pq.write_table(pa.table(rows), folder / f"data-{file:05d}.parquet")
    return folder
