"""A small corpus in an S3-compatible server on loopback, behind a proxy that fails as planned."""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs

from data_pipeline.record import SeriesRecord
from data_pipeline.shards import Corpus, Manifest
from data_pipeline.shards.index import SeriesIndex, write_index
from data_pipeline.shards.manifest import SourceEntry, corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.storage import RetryPolicy, Store, remote
from fault_proxy import FaultProxy, fault_proxy

QUICK = RetryPolicy(attempts=4, first_delay_seconds=0.01, max_delay_seconds=0.02)
NUM_SERIES, LENGTH, SHARD_BYTES = 12, 100_000, 900_000
CHUNK = 64 * 1024
URL = "s3://bucket/corpora/walks"


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


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    """Run a server with an empty bucket, and give its port."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from moto.server import ThreadedMotoServer

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
def uploaded(server, local) -> None:
    store = Store.at(URL)
    for name in Store.at(local).files():
        store.put_file(name, local / name)


@pytest.fixture
def proxy(server, uploaded, monkeypatch, tmp_path) -> Iterator[FaultProxy]:
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
