"""What goes wrong between a reader and a remote store: what passes, and what stays."""

import numpy as np
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards import Corpus
from data_pipeline.shards.verify import verify_changed, verify_corpus
from data_pipeline.storage import FileCache, Store
from fault_proxy import Fault, always, let_pass, on_shards
from remote_walks import CHUNK, LENGTH, QUICK, SHARD_BYTES, URL, assert_equal_to_local

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
