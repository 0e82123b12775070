"""Corpora in a remote store: read, written, cached, and shared by the processes of a node."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import Corpus, Manifest
from data_pipeline.shards.verify import verify_changed, verify_corpus
from data_pipeline.storage import FileCache, Store
from fault_proxy import Fault, always, let_pass, on_shards
from remote_walks import CHUNK, LENGTH, NUM_SERIES, QUICK, SHARD_BYTES, URL, assert_equal_to_local
from small_run import build_small_corpus, small_config
from tsmoe.__main__ import main
from tsmoe.train.loop import Outcome, pretrain


def run_python(code: str, *arguments: str) -> subprocess.Popen:
    """Start a process that reads remote files in small chunks."""
    header = (
        "import sys; from data_pipeline.storage import remote, FileCache, Store, RetryPolicy\n"
        f"remote.CHUNK_BYTES = {CHUNK}\n"
        "from data_pipeline.shards import Corpus\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", header + code, *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
    )


READ_FIRST = f"print(float(Corpus.open('{URL}').series(0).sum()))"


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


# Reading and writing.


def test_uploaded_corpus_is_the_local_one(proxy, store, local) -> None:
    corpus = Corpus.open(store)
    assert proxy.count("GET", "part-") == 0  # the index tells all that is needed
    assert corpus.train_lengths[3] == 0
    assert corpus.fingerprint == Corpus.open(local).fingerprint
    np.testing.assert_array_equal(corpus.series_shards, np.arange(NUM_SERIES) // 2)
    assert_equal_to_local(corpus, local)
    assert corpus.find("walk7") == 7
    assert verify_corpus(URL) == []
    assert verify_changed(corpus) == []
    assert_equal_to_local(pickle.loads(pickle.dumps(corpus)), local)


def test_names_sizes_copies_and_removal(store, local) -> None:
    place = Store.at(f"{URL}-other", QUICK)
    place.write_bytes("BUILDING/00000.json", b"{}")
    place.put_file("BUILDING/part-00000.arrow", local / "part-00000.arrow")
    place.copy("BUILDING/part-00000.arrow", "part-00000.arrow")
    size = (local / "part-00000.arrow").stat().st_size
    assert place.files("BUILDING") == {
        "BUILDING/00000.json": 2,
        "BUILDING/part-00000.arrow": size,
    }
    assert place.read_bytes("part-00000.arrow") == (local / "part-00000.arrow").read_bytes()
    place.remove("part-00000.arrow")
    place.remove("part-00000.arrow")  # nothing there, nothing to do
    place.remove_folder("BUILDING")
    place.remove_folder("BUILDING")
    assert place.files() == {}
    assert not place.exists("part-00000.arrow")
    assert Store.at(URL).size("manifest.json") == (local / "manifest.json").stat().st_size


def test_commands_take_a_url(proxy, capsys) -> None:
    for action in ("status", "stats", "verify"):
        assert main(["data", action, URL]) == 0
        assert "walks" in capsys.readouterr().out
    assert main(["data", "inspect", URL, "--item", "walk4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["points"] == LENGTH
    assert main(["data", "status", f"{URL}-not"]) == 3


def test_pretraining_is_the_same_from_a_url(proxy, tmp_path) -> None:
    folder = build_small_corpus(tmp_path / "small")
    url = "s3://bucket/corpora/small"
    for name in Store.at(folder).files():
        Store.at(url).put_file(name, folder / name)
    steps = {"training": {"steps": 2}}
    losses = []
    for number, corpus in enumerate((str(folder), url)):
        run = tmp_path / f"run{number}"
        config = small_config(Path("unused"), {"corpus": corpus, "run": str(run)}, steps)
        assert pretrain(config) is Outcome.DONE
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss/train") for line in lines])
    assert losses[0] == losses[1]
    assert any(loss is not None for loss in losses[0])


@pytest.mark.alone
def test_prefetched_shard_is_there_when_it_is_read(proxy, store, local) -> None:
    corpus = Corpus.open(store, cache=FileCache.of_node())
    proxy.plan = always(Fault(bytes_per_second=20e6))
    begun = time.monotonic()
    corpus.prefetch([4, 5, 4])
    assert time.monotonic() - begun < 0.05
    names = [corpus.manifest.shards[number].sha256 for number in (4, 5)]
    wait_for(lambda: all((FileCache.of_node().folder / name).exists() for name in names))
    proxy.forget()
    np.testing.assert_array_equal(corpus.series(9), Corpus.open(local).series(9))
    assert proxy.requests == []


def test_forked_process_reads_fetches_and_prefetches(proxy, store, local) -> None:
    corpus = Corpus.open(store)
    cached = FileCache.of_node().folder
    first, last = (corpus.manifest.shards[number].sha256 for number in (0, 5))
    corpus.prefetch([0])
    wait_for((cached / first).exists)
    expected = [float(Corpus.open(local).series(number).sum()) for number in (0, 6)]
    child = os.fork()
    if child == 0:
        found = [float(corpus.series(number).sum()) for number in (0, 6)]
        corpus.prefetch([5])  # the threads that did this are those of the parent
        wait_for((cached / last).exists)
        os._exit(0 if found == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_process_ends_in_the_middle_of_a_prefetch(proxy) -> None:
    proxy.plan = on_shards(Fault(bytes_per_second=100e3))
    process = run_python(f"c = Corpus.open('{URL}'); c.prefetch(range(6)); print('asked')")
    assert process.communicate(timeout=15)[0] == "asked\n"
    assert process.returncode == 0


# Downloads that are interrupted, and shared.


def test_interrupted_download_goes_on_where_it_ended(proxy, store, local) -> None:
    corpus = Corpus.open(store)
    size = corpus.manifest.shards[0].bytes
    proxy.forget()
    proxy.plan = always(Fault(status=503), after=6)
    with pytest.raises(DataError, match="failed 4 times"):
        corpus.series(0)
    first = proxy.body_bytes
    assert CHUNK < first < size
    proxy.plan = let_pass
    np.testing.assert_array_equal(corpus.series(0), Corpus.open(local).series(0))
    assert proxy.body_bytes == size  # no byte was fetched twice


def test_killed_download_goes_on_in_the_next_process(proxy, local) -> None:
    size = Manifest.read(local).shards[0].bytes
    proxy.plan = on_shards(Fault(bytes_per_second=400e3))
    process = run_python(READ_FIRST)
    partial = [FileCache.of_node().folder, "*.partial"]
    wait_for(lambda: any(p.stat().st_size > 3 * CHUNK for p in partial[0].glob(partial[1])))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = next(partial[0].glob(partial[1])).stat().st_size
    proxy.plan = let_pass
    proxy.forget()
    expected = float(Corpus.open(local).series(0).sum())
    assert float(run_python(READ_FIRST).communicate(timeout=30)[0]) == expected
    # Beside the shard, a process reads manifest and index.
    assert proxy.body_bytes <= size - kept + 20_000
    assert list(partial[0].glob(partial[1])) == []


def test_processes_of_a_node_share_one_download(proxy, local) -> None:
    proxy.plan = on_shards(Fault(bytes_per_second=1e6))
    processes = [run_python(READ_FIRST) for _ in range(2)]
    sums = {float(process.communicate(timeout=30)[0]) for process in processes}
    assert sums == {float(Corpus.open(local).series(0).sum())}
    shard = Manifest.read(local).shards[0]
    assert proxy.count("GET", shard.file) == -(-shard.bytes // CHUNK)


@pytest.mark.parametrize("shards_that_fit", [1, 2])
def test_cache_keeps_to_its_limit(proxy, store, local, tmp_path, shards_that_fit) -> None:
    limit = int((shards_that_fit + 0.5) * SHARD_BYTES)
    cache = FileCache(folder=tmp_path / "small", limit_bytes=limit, patience_seconds=0.1)
    corpus = Corpus.open(store, cache=cache)
    assert corpus.max_resident_shards == shards_that_fit
    same = Corpus.open(local)
    for number in (0, 2, 4, 6, 8, 10, 0, 11):
        np.testing.assert_array_equal(corpus.series(number), same.series(number))
        assert cache.used_bytes() <= limit
    series = np.arange(NUM_SERIES)
    np.testing.assert_array_equal(
        corpus.gather(series, series * 7, 100), same.gather(series, series * 7, 100)
    )
    assert cache.used_bytes() <= limit


def test_process_leaves_half_of_the_cache_to_others(proxy, store, local, tmp_path) -> None:
    limit = int(4.5 * Manifest.read(local).shards[0].bytes)
    cache = FileCache(folder=tmp_path / "shared", limit_bytes=limit, patience_seconds=0.1)
    first, second = (Corpus.open(store, cache=cache) for _ in range(2))
    for number in (0, 2, 4, 6):  # four shards, which would fill it
        first.series(number)
    np.testing.assert_array_equal(second.series(8), Corpus.open(local).series(8))


def test_shard_that_the_cache_cannot_hold_is_refused(proxy, store, tmp_path) -> None:
    cache = FileCache(folder=tmp_path / "small", limit_bytes=SHARD_BYTES // 2)
    corpus = Corpus.open(store, cache=cache)
    with pytest.raises(DataError, match=r"part-00000.*\d{6} bytes are more.*TSMOE_CACHE_BYTES"):
        corpus.series(0)
