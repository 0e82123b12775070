"""Points per second that loaders deliver as training batches, side by side, in turns.

A corpus of 20 million points as few long series and as many short ones; batches of 512 windows of
2,976 points at random. Each turn is a process of its own, the turns alternate, and CPU seconds
(of workers too) stand beside wall time: they hold on a busy machine. The measure is the bare
gather of the same windows out of a memory map by two processes.

    python benchmarks/loader.py

Peers that are no dependency of ours run in an environment of their own:

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install torch==2.13.0 'gluonts[arrow]==0.17.0' packaging 'numpy<2.2'
    /tmp/peers/bin/pip install --no-deps mosaicml-streaming==0.13.0
    /tmp/peers/bin/pip install azure-identity azure-storage-blob azure-storage-file-datalake
    /tmp/peers/bin/pip install boto3 brotli catalogue google-cloud-storage matplotlib oci paramiko
    /tmp/peers/bin/pip install python-snappy tqdm transformers 'xxhash<4' zstd
    python benchmarks/loader.py --peers-python /tmp/peers/bin/python

Time-MoE, OpenLTM and Large-Time-Series-Model are not packages: `PEERS=folder`, with clones of them
under these names, takes those in that are there (`pip install datasets scikit-learn tqdm` besides).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.record import SeriesRecord
from data_pipeline.shards.manifest import Manifest, SourceEntry, corpus_fingerprint
from data_pipeline.shards.writer import ShardWriter
from record import record
from runs import environment
from turns import WINDOW_LENGTH

LAYOUTS = {"long": (80, 250_000), "short": (4096, 4_883)}
REFERENCE = "numpy gather, 2 processes"
OURS = "ours, 2 workers"
HERE = Path(__file__).parent


def write_corpus(folder: Path, *, count: int, length: int, gap_share: float = 0.0) -> None:
    """Write random walks as a corpus, as one array, and in the formats that peers read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = np.random.default_rng(0)
    points = generator.standard_normal((count, length), dtype=np.float32).cumsum(1)
    # Gaps as they are: a day of minutes here, an hour there.
    gaps = int(gap_share * points.size / 100)
    for series, first in zip(
        generator.integers(0, count, gaps), generator.integers(0, length - 100, gaps), strict=True
    ):
        points[series, first : first + 100] = np.nan
    (folder / "corpus").mkdir(parents=True)
    np.save(folder / "values.npy", points.reshape(-1))
    np.save(folder / "ends.npy", (np.arange(count) + 1) * length)
    writer = ShardWriter(folder / "corpus", train_fraction=1.0)
    for number, series in enumerate(points):
        writer.add(
            SeriesRecord(
                item_id=f"s{number}", start=None, end=None, freq="h", domain="Benchmark",
                source=f"source{number % 8}", variate=0, values=series,
            )
        )  # fmt: skip
    shards = writer.close()
    Manifest(
        fingerprint=corpus_fingerprint(shards, 1.0), train_fraction=1.0, shards=shards,
        sources={f"source{i}": SourceEntry() for i in range(8)}, drops={}, config={},
        config_hash="", inputs=[],
    ).write(folder / "corpus")  # fmt: skip
    values = pa.array(points.reshape(-1))
    offsets = pa.array(np.arange(count + 1) * length, pa.int32())
    series_table = pa.table({"target": pa.ListArray.from_arrays(offsets, values)})
    for part in range(8):  # as many files as a loader may want to deal to its workers
        rows = series_table.slice(part * count // 8, count // 8)
        pq.write_table(rows, folder / f"series{part}.parquet", row_group_size=max(1, count // 64))
    per_series = length // WINDOW_LENGTH
    windows = points[:, : per_series * WINDOW_LENGTH].reshape(-1)
    window_offsets = pa.array(np.arange(count * per_series + 1) * WINDOW_LENGTH, pa.int32())
    table = pa.table({"target": pa.ListArray.from_arrays(window_offsets, pa.array(windows))})
    pq.write_table(table, folder / "windows.parquet", row_group_size=256)


def turn(python: str, script: str, name: str, folder: Path, seconds: float) -> dict[str, float]:
    """Run one turn; its last line is what it found."""
    done = subprocess.run(
        [python, str(HERE / script), name, str(folder), str(seconds)],
        capture_output=True, text=True, env=environment(), timeout=600,
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        raise SystemExit(f"{script} {name}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(turns: list[dict[str, float]]) -> dict[str, float]:
    """Best and median of several turns."""
    rates = [t["points"] / t["wall"] for t in turns]
    per_cpu = [t["points"] / t["cpu"] for t in turns if t["cpu"]]
    return {
        "points_per_second_best": round(max(rates)),
        "points_per_second_median": round(statistics.median(rates)),
        "points_per_cpu_second_best": round(max(per_cpu)),
        "points_per_cpu_second_median": round(statistics.median(per_cpu)),
        "first_batch_seconds": round(
            min(t.get("open_seconds", 0) + t["first_batch_seconds"] for t in turns), 3
        ),
    }


def ratios(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ours over each other: best and median turn by wall time, and the median by CPU time."""
    return {
        name: {
            f"ours_over_it_{label}": round(found[OURS][key] / other[key], 2)
            for label, key in (
                ("best", "points_per_second_best"),
                ("median", "points_per_second_median"),
                ("cpu", "points_per_cpu_second_median"),
            )
        }
        for name, other in found.items()
        if name != OURS and not name.startswith("busy")
    }


def busy_slowdown(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """How much longer a step of a consumer that is busy in Python takes with a loader beside it."""
    alone = found["busy consumer, no loader"]["points_per_second_median"]
    return {
        kind: round(alone / found[f"busy consumer, 2 {kind}"]["points_per_second_median"], 3)
        for kind in ("threads", "processes")
    }


def main() -> None:
    """Run all contenders in turns and record what they deliver."""
    import loader_turns

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one turn")
    parser.add_argument("--peers-python", help="interpreter of the peers' environment")
    parser.add_argument("--only", help="contenders whose name contains this")
    parser.add_argument("--layouts", nargs="+", default=["long", "short", "gaps"])
    args = parser.parse_args()
    contenders = [
        (sys.executable, "loader_turns.py", name)
        for name in [*loader_turns.BY_PROCESSES, *loader_turns.BATCHES]
    ]
    if args.peers_python:
        listed = subprocess.run(
            [args.peers_python, str(HERE / "peer_loaders.py"), "--list"],
            capture_output=True, text=True, check=True, env=os.environ,
        )  # fmt: skip
        contenders += [
            (args.peers_python, "peer_loaders.py", name) for name in json.loads(listed.stdout)
        ]
    if args.only:
        contenders = [c for c in contenders if args.only in c[2] or c[2] in (REFERENCE, OURS)]
    results: dict[str, Any] = {"rounds": args.rounds, "seconds": args.seconds}
    with tempfile.TemporaryDirectory() as name:
        for layout in args.layouts:
            folder = Path(name) / layout
            count, length = LAYOUTS["long" if layout == "gaps" else layout]
            write_corpus(
                folder, count=count, length=length, gap_share=0.01 if layout == "gaps" else 0.0
            )
            # Peers have no mask of what is missing: gaps are measured for ours alone.
            chosen = [c for c in contenders if layout != "gaps" or c[2] in (REFERENCE, OURS)]
            turns: dict[str, list[dict[str, float]]] = {c[2]: [] for c in chosen}
            for _ in range(args.rounds):
                for python, script, contender in chosen:
                    turns[contender].append(turn(python, script, contender, folder, args.seconds))
            found = {contender: summary(of) for contender, of in turns.items()}
            results[layout] = {"delivered": found, "ratios": ratios(found)}
            if "busy consumer, no loader" in found:
                results[layout]["step_with_loader_over_without"] = busy_slowdown(found)
    record("loader", results, notes="batches of 512 windows of 2,976 points; turns alternate")


if __name__ == "__main__":
    main()
