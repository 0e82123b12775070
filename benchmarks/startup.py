"""How long a training process takes, and what memory, until it has its first batch of windows.

The corpus has a million short series by default. The interpreter with torch and tsmoe imported is
taken off; what remains is opening the corpus, numbering its windows and cutting one batch. The
first start checks all hashes; the others find the shards as they were.
Run: python benchmarks/startup.py [--series 1000000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data_pipeline.record import SeriesRecord
from data_pipeline.shards.index import SeriesIndex, write_index
from data_pipeline.shards.manifest import Manifest, SourceEntry, corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import Store
from record import ROOT, record

_POINTS = 256
_BATCH = 512


def write_corpus(folder: Path, num_series: int) -> None:
    """Write a corpus of equally long random series of a hundred sources."""
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, train_fraction=0.9)
    sources: dict[str, SourceEntry] = {}
    for number in range(num_series):
        name = f"source_{number * 100 // num_series:02d}"
        record_of = SeriesRecord(
            item_id=f"{name}_{number}",
            start=None,
            end=None,
            freq="h",
            domain="Web",
            source=name,
            variate=0,
            values=generator.standard_normal(_POINTS, dtype=np.float32),
        )
        writer.add(record_of)
        entry = sources.setdefault(name, SourceEntry(domains=["Web"], freqs=["h"]))
        entry.series += 1
        entry.points += _POINTS
    shards = writer.close()
    parts = [SeriesIndex.of_shard(open_shard(folder / shard.file)) for shard in shards]
    Manifest(
        fingerprint=corpus_fingerprint(shards, 0.9),
        train_fraction=0.9,
        shards=shards,
        index=write_index(Store.at(folder), SeriesIndex.join(parts)),
        sources=sources,
        drops={},
        config={},
        config_hash="",
        inputs=[],
    ).write(folder)


def start(folder: str) -> dict[str, Any]:
    """Do what a training process does before its first step, and measure it."""
    import torch

    from data_pipeline.shards import Corpus
    from data_pipeline.shards.verify import verify_changed
    from tsmoe.data.loader import DataConfig, TrainingBatches
    from tsmoe.data.windows import training_windows, validation_windows
    from tsmoe.ranks import Ranks

    torch.zeros(1)
    process = psutil.Process()
    base, begun = process.memory_info(), time.perf_counter()
    corpus = Corpus.open(folder)
    assert not verify_changed(corpus)
    verified = time.perf_counter()
    lengths = {"window_length": 2976, "patch_length": 96}
    index = training_windows(corpus, stride=1, **lengths)
    validation = validation_windows(corpus, **lengths)
    batches = TrainingBatches(
        corpus,
        index,
        DataConfig(),
        seed=0,
        global_batch_size=_BATCH,
        micro_batch_size=_BATCH,
        ranks=Ranks(),
    )
    ready = time.perf_counter()
    batches[0]
    done, memory = time.perf_counter(), process.memory_info()
    return {
        "series": corpus.num_series,
        "windows": index.num_windows + validation.num_windows,
        "open_and_verify_seconds": round(verified - begun, 3),
        "index_windows_seconds": round(ready - verified, 3),
        "first_batch_seconds": round(done - ready, 3),
        "seconds": round(done - begun, 3),
        "private_memory_mib": round((_private(memory) - _private(base)) / 2**20, 1),
        "memory_with_mapped_pages_mib": round((memory.rss - base.rss) / 2**20, 1),
    }


def _private(memory: Any) -> int:  # Any: psutil's named tuple differs by system
    # Pages of the memory-mapped corpus belong to the page cache; all processes share them.
    return memory.rss - memory.shared


def main() -> None:
    """Write the corpus, and start four times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=10**6)
    parser.add_argument("--start", metavar="CORPUS")
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return
    with tempfile.TemporaryDirectory() as name:
        corpus, cache = Path(name) / "corpus", Path(name) / "cache"
        corpus.mkdir()
        write_corpus(corpus, args.series)
        time.sleep(3)  # a file that has just changed is not taken for verified
        command = [sys.executable, str(Path(__file__)), "--start", str(corpus)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TSMOE_CACHE": str(cache)}
        starts = []
        for _ in range(4):
            output = subprocess.run(command, check=True, capture_output=True, env=environment)
            starts.append(json.loads(output.stdout))
    record("startup", {"first": starts[0], "again": sorted(starts[1:], key=lambda s: s["seconds"])})


if __name__ == "__main__":
    main()
