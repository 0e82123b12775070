"""Corpora in an S3-compatible server on loopback, behind a proxy that makes things go wrong."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import SeriesRecord
from data_pipeline.shards import Corpus, Manifest
from data_pipeline.shards.index import SeriesIndex, write_index
from data_pipeline.shards.manifest import SourceEntry, corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.verify import verify_changed, verify_corpus
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import FileCache, RetryPolicy, Store, remote
from fault_proxy import Fault, FaultProxy, Plan, fault_proxy, let_pass
from small_run import build_small_corpus, small_config
from tsmoe.__main__ import main
from tsmoe.train.loop import Outcome, pretrain

QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.02)
NUM_SERIES, LENGTH, SHARD_BYTES = 12, 100_000, 900_000
CHUNK = 64 * 1024
URL = "s3://bucket/corpora/walks"


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Run a server with an empty bucket, and give its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        maker = fs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{port}", allow_bucket_creation=True
        )
        maker.create_dir("bucket")
        yield port
    moto.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Write a corpus of six shards with a series index and a series that is held out."""
    folder = tmp_path_factory.mktemp("walks")
    generator = np.random.default_rng(0)
    writer = ShardWriter(folder, train_fraction=0.9, shard_size_bytes=SHARD_BYTES)
    for number in range(NUM_SERIES):
        record = SeriesRecord(
            item_id=f"walk{number}",
            start=None,
            end=None,
            freq="h",
            domain="Nature",
            source="walks",
            variate=0,
            values=generator.normal(size=LENGTH).astype(np.float32),
        )
        writer.add(record, is_held_out=number == 3)
    shards = writer.close()
    parts = [SeriesIndex.of_shard(open_shard(folder / s.file), s.held_out) for s in shards]
    Manifest(
        fingerprint=corpus_fingerprint(shards, 0.9),
        train_fraction=0.9,
        shards=shards,
        sources={"walks": SourceEntry(series=NUM_SERIES, points=NUM_SERIES * LENGTH)},
        drops={},
        config={},
        config_hash="",
        inputs=[],
        index=write_index(Store.at(folder), SeriesIndex.join(parts)),
    ).write(folder)
    return folder


@pytest.fixture(scope="module")
def _uploaded(server, local) -> None:
    store = Store.at(URL)
    for name in Store.at(local).files():
        store.put_file(name, local / name)


@pytest.fixture
def proxy(server, _uploaded, monkeypatch, tmp_path) -> Iterator[FaultProxy]:
    """Put a proxy in the way, which lets everything pass as long as it has no plan."""
    monkeypatch.setenv("TSMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TSMOE_CACHE_BYTES", str(100 * SHARD_BYTES))
    monkeypatch.setattr(remote, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(remote, "_MIN_CHUNK_BYTES", CHUNK // 4)
    with fault_proxy(server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.port}")
        yield running


@pytest.fixture
def store(proxy) -> Store:
    return Store.at(URL, QUICK)


def always(fault: Fault, *, after: int = 0) -> Plan:
    """Plan the same fault for every request, but for the first few."""

    def plan(method: str, path: str, count: int) -> Fault | None:
        return fault if count >= after else None

    return plan


def on_shards(fault: Fault, *, every: int = 1) -> Plan:
    """Plan the same fault for reading every n-th piece of a shard."""
    seen = iter(range(10**9))

    def plan(method: str, path: str, count: int) -> Fault | None:
        is_meant = method == "GET" and "part-" in path and next(seen) % every == every - 1
        return fault if is_meant else None

    return plan


def assert_equal_to_local(corpus: Corpus, folder: Path) -> None:
    same = Corpus.open(folder)
    generator = np.random.default_rng(1)
    series = generator.integers(0, NUM_SERIES, 64)
    starts = generator.integers(0, LENGTH - 500, 64)
    np.testing.assert_array_equal(
        corpus.gather(series, starts, 500), same.gather(series, starts, 500)
    )
    for number in range(NUM_SERIES):
        np.testing.assert_array_equal(corpus.series(number), same.series(number))


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


# What goes wrong, and passes.


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=429),
        Fault(resets=True),
        Fault(cut_after=20_000),
        Fault(falsifies=True),
    ],
    ids=["unavailable", "throttled", "reset", "cut", "false byte"],
)
def test_passing_faults_do_not_show(proxy, store, local, fault) -> None:
    # One piece in seven or, as a false byte costs the whole file, one in forty.
    proxy.plan = on_shards(fault, every=40 if fault.falsifies else 7)
    assert_equal_to_local(Corpus.open(store), local)
    assert proxy.count("GET", "part-") > 6 * -(-SHARD_BYTES // CHUNK)  # some came twice


def test_line_that_breaks_every_time_still_makes_way(proxy, store, local) -> None:
    proxy.plan = on_shards(Fault(cut_after=CHUNK // 2))
    np.testing.assert_array_equal(Corpus.open(store).series(0), Corpus.open(local).series(0))


def test_slow_line_is_waited_for(proxy, store, local) -> None:
    proxy.plan = on_shards(Fault(bytes_per_second=1e6))
    np.testing.assert_array_equal(Corpus.open(store).series(0), Corpus.open(local).series(0))


def test_failed_upload_is_done_again_and_whole(proxy, store, local) -> None:
    failing = iter([True, False] * 100)

    def plan(method: str, path: str, count: int) -> Fault | None:
        is_upload = method in ("PUT", "POST")
        return Fault(status=500) if is_upload and next(failing) else None

    proxy.plan = plan
    name = "again/part-00000.arrow"
    store.put_file(name, local / "part-00000.arrow")
    proxy.plan = let_pass
    assert store.read_bytes(name) == (local / "part-00000.arrow").read_bytes()


# What goes wrong, and stays.


def test_refused_access_is_not_tried_again(proxy) -> None:
    proxy.plan = always(Fault(status=403))
    with pytest.raises(DataError, match=rf"{URL}/manifest\.json: .*denied.*AWS_ACCESS_KEY_ID"):
        Corpus.open(URL)
    assert len(proxy.requests) == 1


def test_missing_shard_is_named_and_not_tried_again(proxy, store, local) -> None:
    partly = Store.at(f"{URL}-partly", QUICK)
    for name in Store.at(local).files():
        if name != "part-00002.arrow":
            partly.put_file(name, local / name)
    corpus = Corpus.open(partly)
    proxy.forget()
    with pytest.raises(DataError, match=r"walks-partly/part-00002\.arrow: .*no such file"):
        corpus.series(4)
    assert proxy.count("GET", "part-00002") + proxy.count("HEAD", "part-00002") <= 2
    assert "part-00002.arrow: the shard is missing" in verify_corpus(partly)[0]
    assert "part-00002.arrow: the shard is missing" in verify_changed(corpus)[0]


def test_outage_ends_with_the_last_reason(proxy, store) -> None:
    proxy.plan = always(Fault(status=503))
    with pytest.raises(DataError, match=r"manifest\.json: failed 4 times in .*503.*start again"):
        Corpus.open(store)
    assert len(proxy.requests) == QUICK.attempts


def test_false_bytes_are_never_accepted(proxy, store) -> None:
    corpus = Corpus.open(store)
    proxy.plan = on_shards(Fault(falsifies=True))
    with pytest.raises(DataError, match=r"part-00000\.arrow: sha256 is .*, 3 times"):
        corpus.series(0)
    assert not (FileCache.of_node().folder / corpus.manifest.shards[0].sha256).exists()
    assert "sha256" in verify_corpus(store)[0]
    proxy.plan = let_pass
    assert len(corpus.series(0)) == LENGTH


def test_unknown_places_are_refused_at_once() -> None:
    for url, words in (
        ("s3://bucket/x?endpoint_overide=y", "unknown endpoint_overide; known: region"),
        ("nowhere://x", "Protocol not known"),
        ("s3://", "no bucket"),
    ):
        with pytest.raises(ConfigError, match=words):
            Store.at(url)


def test_credentials_in_a_url_stay_out_of_messages(server) -> None:
    store = Store.at("s3://key:secret@bucket/x?region=us-east-1", QUICK)
    assert str(store) == "s3://bucket/x"
    assert store.location == "s3://key:secret@bucket/x?region=us-east-1"


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
    limit = int(4.5 * SHARD_BYTES)
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
