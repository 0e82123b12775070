"""Build speed, and peak memory as the corpus grows, from Parquet and from UTSD's arrow layout.

All curation steps are on. The series are made for the purpose (seasons, trend, noise, gaps), as no
corpus of these sizes can be passed on. Every build is one process of its own; its peak memory is
what the kernel reports. Run: python benchmarks/build.py [--points 20 60 600] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from record import ROOT, record

_SERIES_POINTS = 40_000
_SERIES_AT_ONCE = 32
_CORPUS = """sources: [{{{source}}}]
clean: {{min_length: 64}}
"""


def batches(points: int) -> Iterator[pa.RecordBatch]:
    """Yield rows of UTSD's columns until there are about so many points."""
    steps = np.arange(_SERIES_POINTS, dtype=np.float32)
    number = 0
    while number * _SERIES_POINTS < points:
        rng = np.random.default_rng(number)
        rows = []
        for _ in range(_SERIES_AT_ONCE):
            period = rng.choice([24, 48, 96, 144, 288])
            values = np.sin(steps * np.float32(2 * np.pi / period) + rng.random(dtype=np.float32))
            values *= rng.random(dtype=np.float32) + np.float32(0.5)
            values += rng.standard_normal(len(steps), dtype=np.float32) * np.float32(0.3)
            values += steps * np.float32(rng.normal() * 1e-4)
            if rng.random() < 0.1:
                start = rng.integers(0, _SERIES_POINTS - 500)
                values[start : start + 500] = np.nan
            rows.append(values)
        names = [f"Energy_made_{number + row}" for row in range(_SERIES_AT_ONCE)]
        yield pa.record_batch(
            {
                "item_id": names,
                "start": pa.array([0] * _SERIES_AT_ONCE, pa.timestamp("us")),
                "end": pa.array([0] * _SERIES_AT_ONCE, pa.timestamp("us")),
                "freq": ["15T"] * _SERIES_AT_ONCE,
                "target": pa.array(rows, pa.list_(pa.float32())),
            }
        )
        number += _SERIES_AT_ONCE


def write_parquet(folder: Path, points: int) -> str:
    """Write one file with a row group per batch; return the source for a corpus YAML."""
    file = folder / "made.parquet"
    writer = None
    for batch in batches(points):
        writer = writer or pq.ParquetWriter(file, batch.schema, compression="zstd")
        writer.write_batch(batch)
    assert writer is not None
    writer.close()
    return f"type: parquet, path: {file}"


def write_arrow(folder: Path, points: int) -> str:
    """Write stream files of 100 MB, as `datasets` and UTSD have them."""
    data = folder / "UTSD-made"
    data.mkdir()
    writer, written, number = None, 0, 0
    for batch in batches(points):
        if writer is None:
            writer = pa.ipc.new_stream(data / f"data-{number:05d}.arrow", batch.schema)
            written, number = 0, number + 1
        writer.write_batch(batch)
        written += batch.nbytes
        if written > 100e6:
            writer.close()
            writer = None
    if writer is not None:
        writer.close()
    return f"type: hub, path: {data}"


def build(folder: Path, source: str, processes: int) -> dict[str, Any]:
    """Build in a process of its own, and say how long it took and what memory it touched."""
    (folder / "corpus.yaml").write_text(_CORPUS.format(source=source))
    out = folder / "corpus"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "tsmoe", "data", "build", str(folder / "corpus.yaml")]
    command += ["--out", str(out), "--processes", str(processes), "--json"]
    begun = time.monotonic()
    read_end, write_end = os.pipe()
    child = os.posix_spawn(
        command[0],
        command,
        os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        file_actions=[(os.POSIX_SPAWN_DUP2, write_end, 1)],
    )
    os.close(write_end)
    with os.fdopen(read_end) as output:
        text = output.read()
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - begun
    if status:
        raise SystemExit(f"the build failed: {text}")
    summary = json.loads(text)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {
        "processes": processes,
        "points": summary["points"],
        "series": summary["series"],
        "dropped": summary["dropped"],
        "seconds": round(seconds, 1),
        "points_per_second": round(summary["points"] / seconds),
        "points_per_cpu_second": round(summary["points"] / cpu_seconds),
        "peak_memory_mib": round(usage.ru_maxrss / 1024),
    }


def main() -> None:
    """Measure every layout at every size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[20, 60, 600], help="millions")
    parser.add_argument("--folder", default=None, help="where to write; 8 bytes a point needed")
    args = parser.parse_args()
    results = []
    for name, write in (("parquet", write_parquet), ("utsd_arrow", write_arrow)):
        for millions in args.points:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                source = write(Path(folder), millions * 10**6)
                for processes in (1, 2) if millions == min(args.points[-2:]) else (1,):
                    row = {"layout": name, "millions": millions}
                    results.append(row | build(Path(folder), source, processes))
                    print(results[-1], flush=True)
    record("build", {"builds": results})


if __name__ == "__main__":
    main()
