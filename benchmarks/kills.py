"""Kill -9 builders, mergers, readers and downloaders at random moments, and look for damage.

What counts as damage: a corpus that opens and is not the one that an undisturbed build makes; a
restarted build that makes other bytes; a training window that a restarted reader sees twice or not
at all; a file of the cache that is not what the store holds. Builders are the real command; the
shared store is an S3-compatible server on loopback (`moto`, of the development tools).
Run: python benchmarks/kills.py [--kills 200]
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.shards import Corpus
from data_pipeline.shards.verify import verify_corpus
from data_pipeline.storage import Store
from record import ROOT, record

_SERIES, _POINTS = 192, 20_000
_BATCHES = 400
_URL = "s3://bucket/corpus"


def make_sources(folder: Path) -> Path:
    """Write three Parquet files with some copies among their series; return the corpus YAML."""
    generator = np.random.default_rng(0)
    rows = [generator.normal(size=_POINTS).astype(np.float32) for _ in range(_SERIES)]
    rows[100] = rows[3]
    rows[170] = rows[20] * np.float32(2.5) + np.float32(7)
    for part in range(3):
        names = [f"made_{number}" for number in range(part, _SERIES, 3)]
        table = pa.table({"item_id": names, "target": rows[part::3]})
        pq.write_table(table, folder / f"part{part}.parquet", row_group_size=8)
    corpus = folder / "corpus.yaml"
    corpus.write_text("sources: [{type: parquet, path: 'part*.parquet'}]\nshard_size_bytes: 700000")
    return corpus


def files_of(folder: Path) -> dict[str, str]:
    """Hash every file by its name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@contextmanager
def child(arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a group of its own, and leave none of the group behind."""
    process = subprocess.Popen(
        arguments,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Send SIGKILL to all of the group; say whether the process was still at work."""
    was_running = process.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return was_running


def run_to_the_end(arguments: list[str]) -> float:
    """Run undisturbed and return the seconds it took."""
    begun = time.monotonic()
    with child(arguments) as process:
        _, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{arguments} failed: {errors.decode()}")
    return time.monotonic() - begun


def kill_builders(corpus: Path, folder: Path, kills: int, *, in_merge: bool) -> dict[str, Any]:
    """Kill builds, at any moment or in the merge, until they come through in between."""
    build = [sys.executable, "-m", "tsmoe", "data", "build", str(corpus), "--processes", "1"]
    seconds = run_to_the_end([*build, "--out", str(folder / "whole")])
    whole = files_of(folder / "whole")
    out = folder / ("merged" if in_merge else "built")
    counts = {"kills": 0, "completed_builds": 0, "wrong_corpora_accepted": 0, "wrong_bytes": 0}
    while counts["kills"] < kills:
        with child([*build, "--out", str(out)]) as process:
            if in_merge:
                wait_for((out / "BUILDING" / "merge.scratch").exists, process)
                time.sleep(random.uniform(0, 0.1 * seconds))
            else:
                time.sleep(random.uniform(0.2 * seconds, 1.1 * seconds))
            counts["kills"] += kill(process)
        try:
            opened = Corpus.open(out)
        except DataError:
            continue  # refused, as it should be
        counts["wrong_corpora_accepted"] += bool(verify_corpus(out))
        del opened
        run_to_the_end([*build, "--out", str(out)])
        counts["completed_builds"] += 1
        counts["wrong_bytes"] += files_of(out) != whole
        shutil.rmtree(out)
    run_to_the_end([*build, "--out", str(out)])
    counts["completed_builds"] += 1
    counts["wrong_bytes"] += files_of(out) != whole
    return counts


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Wait until something is there, or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(0.001)


def reader(corpus: str, log: str) -> None:
    """Read training batches in order from where the log ends; one line for each."""
    from tsmoe.data.loader import DataConfig, TrainingBatches, load_training
    from tsmoe.data.windows import training_windows
    from tsmoe.ranks import Ranks

    path = Path(log)
    done = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    path.write_bytes(b"".join(line + b"\n" for line in done))
    opened = Corpus.open(corpus)
    index = training_windows(opened, window_length=2976, patch_length=96, stride=1)
    batches = TrainingBatches(
        opened,
        index,
        DataConfig(num_workers=2),
        seed=0,
        global_batch_size=32,
        micro_batch_size=32,
        ranks=Ranks(),
        first_window=32 * len(done),
    )
    stream = load_training(
        batches, num_batches=_BATCHES - len(done), num_workers=2, timeout_seconds=60
    )
    with path.open("ab", buffering=0) as file:
        for step, batch in enumerate(stream, start=len(done)):
            digest = hashlib.sha256(batch.values_BCL.numpy().tobytes()).hexdigest()
            file.write(f"{step} {digest}\n".encode())


def kill_readers(corpus: Path, folder: Path, kills: int) -> dict[str, Any]:
    """Kill readers, and compare what all of them saw with what one sees that is left alone."""
    read = [sys.executable, str(Path(__file__)), "--reader", str(corpus)]
    seconds = run_to_the_end([*read, str(folder / "whole.log")])
    whole = (folder / "whole.log").read_text().splitlines()
    counts = {"kills": 0, "completed_runs": 0, "windows": 0, "windows_lost_or_doubled": 0}
    log = folder / "killed.log"
    while counts["kills"] < kills or log.exists():
        with child([*read, str(log)]) as process:
            if counts["kills"] < kills:
                time.sleep(random.uniform(0.5 * seconds, 1.0 * seconds))
                counts["kills"] += kill(process)
            elif process.wait():
                raise SystemExit("a reader failed")
        seen = log.read_text().splitlines() if log.exists() else []
        if len(seen) >= _BATCHES:
            counts["completed_runs"] += 1
            counts["windows"] += 32 * _BATCHES
            differ = sum(a != b for a, b in zip(seen, whole, strict=False))
            counts["windows_lost_or_doubled"] += 32 * (differ + abs(len(seen) - len(whole)))
            log.unlink()
    return counts


def downloader(url: str) -> None:
    """Read every series of a corpus through a cache that holds a third of it."""
    corpus = Corpus.open(url)
    for index in range(corpus.num_series):
        corpus.series(index).sum()


def kill_downloaders(corpus: Path, folder: Path, kills: int) -> dict[str, Any]:
    """Kill readers of a remote corpus; after each, all that is read must be what was stored."""
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    limit = sum(file.stat().st_size for file in corpus.glob("*.arrow")) // 3
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint, "TSMOE_CACHE": str(folder / "cache"),
        "TSMOE_CACHE_BYTES": str(limit),
    }  # fmt: skip
    fs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir("bucket")
    store = Store.at(_URL)
    for name in Store.at(corpus).files():
        store.put_file(name, corpus / name)
    local = Corpus.open(corpus)
    fetch = [sys.executable, str(Path(__file__)), "--downloader", _URL]
    seconds = run_to_the_end(fetch)
    shutil.rmtree(folder / "cache")
    counts = {"kills": 0, "series_read_after_a_kill": 0, "series_that_differ": 0}
    while counts["kills"] < kills:
        with child(fetch) as process:
            time.sleep(random.uniform(0.2 * seconds, 1.0 * seconds))
            counts["kills"] += kill(process)
        remote = Corpus.open(_URL)
        for index in random.sample(range(local.num_series), 12):
            counts["series_read_after_a_kill"] += 1
            same = np.array_equal(remote.series(index), local.series(index), equal_nan=True)
            counts["series_that_differ"] += not same
        if counts["kills"] % 10 == 0:
            shutil.rmtree(folder / "cache")
    server.stop()
    return counts


def main() -> None:
    """Share the kills among the four victims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs=2, metavar=("CORPUS", "LOG"))
    parser.add_argument("--downloader", metavar="URL")
    args = parser.parse_args()
    if args.reader:
        reader(*args.reader)
        return
    if args.downloader:
        downloader(args.downloader)
        return
    random.seed(args.seed)
    share = args.kills // 4
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_sources(folder)
        results = {
            "builder": kill_builders(corpus, folder, args.kills - 3 * share, in_merge=False),
            "merge": kill_builders(corpus, folder, share, in_merge=True),
        }
        results["reader"] = kill_readers(folder / "whole", folder, share)
        results["cache"] = kill_downloaders(folder / "whole", folder, share)
    record("kills", results)


if __name__ == "__main__":
    main()
