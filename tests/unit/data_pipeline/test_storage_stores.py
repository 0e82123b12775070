"""What every store does, on a local folder and on one of fsspec's."""

import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import RetryPolicy, Store
from data_pipeline.storage.durable import PARTIAL_SUFFIX
from data_pipeline.storage.retry import cure_for, retry

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()
AT_ONCE = RetryPolicy(attempts=3, first_delay_seconds=0)


@pytest.fixture(params=["local", "file", "memory"])
def store(request, tmp_path) -> Iterator[Store]:
    match request.param:
        case "local":
            yield Store.at(tmp_path / "corpus")
        case "file":
            yield Store.at((tmp_path / "a corpus").as_uri())
        case "memory":
            yield Store.at("memory://bucket/corpus", AT_ONCE)
            fsspec.filesystem("memory").store.clear()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_empty_place_holds_nothing(store) -> None:
    assert store.files() == {}
    assert store.size("a") is None
    assert not store.exists("a")
    store.remove("a")
    store.remove_folder("b")
    with pytest.raises(DataError, match=r"/a: there is no such file"):
        store.read_bytes("a")


def test_what_is_written_is_read_and_listed(store, file) -> None:
    store.write_bytes("plan.json", b"old")
    store.write_bytes("plan.json", b"{}")
    store.put_file("blocks/1/part", file)
    store.put_file("blocks/1/part", file)
    store.copy("blocks/1/part", "part")
    store.copy("blocks/1/part", "part")
    assert file.read_bytes() == CONTENT  # the local file stays
    assert store.read_bytes("plan.json") == b"{}"
    assert store.read_bytes("part") == CONTENT
    size = len(CONTENT)
    assert store.files() == {"blocks/1/part": size, "part": size, "plan.json": 2}
    assert store.files("blocks") == {"blocks/1/part": size}
    assert store.size("part") == size
    store.remove("part")
    store.remove_folder("blocks")
    assert store.files() == {"plan.json": 2}


def test_copy_of_what_is_not_there_is_refused(store) -> None:
    with pytest.raises(DataError, match=r"/a: .*no such file"):
        store.copy("a", "b")
    assert store.files() == {}


def test_chunks_begin_anywhere(store) -> None:
    store.write_bytes("a", CONTENT)
    assert b"".join(store.chunks("a", start=1000, size=len(CONTENT))) == CONTENT[1000:]
    assert list(store.chunks("a", start=len(CONTENT), size=len(CONTENT))) == []
    with pytest.raises(DataError, match=rf"/a: expected 7 bytes.* {len(CONTENT)}"):
        list(store.chunks("a", start=0, size=7))


def test_fetch_goes_on_with_the_beginning_that_is_there(store, tmp_path, monkeypatch) -> None:
    store.write_bytes("a", CONTENT)
    starts: list[int] = []

    def chunks(self: Store, name: str, *, start: int, size: int) -> Iterator[bytes]:
        starts.append(start)
        return real(self, name, start=start, size=size)

    real = type(store).chunks
    monkeypatch.setattr(type(store), "chunks", chunks)
    target = tmp_path / "down" / "a"
    target.parent.mkdir()
    partial = target.with_name("a" + PARTIAL_SUFFIX)
    for begun in (b"", CONTENT[:700], CONTENT, CONTENT + b"more", b"another" * 100):
        partial.write_bytes(begun)
        store.fetch("a", target, size=len(CONTENT), sha256=SHA256)
        assert target.read_bytes() == CONTENT
        assert not partial.exists()
        target.unlink()
    # What is longer than the file, or is not its beginning, is of no use.
    assert starts == [0, 700, len(CONTENT), 0, 700, 0]


def test_fetch_of_another_content_leaves_nothing_that_looks_whole(store, tmp_path) -> None:
    store.write_bytes("a", CONTENT[::-1])
    target = tmp_path / "a"
    with pytest.raises(DataError, match=rf"/a: sha256 is .* but the manifest has {SHA256[:12]}"):
        store.fetch("a", target, size=len(CONTENT), sha256=SHA256)
    assert not target.exists()


def test_pickled_store_is_the_same_place(store, tmp_path, monkeypatch) -> None:
    store.write_bytes("a", CONTENT)
    content = pickle.dumps(store)
    monkeypatch.chdir("/")
    assert pickle.loads(content).read_bytes("a") == CONTENT
    assert Store.at(store) is store
    assert Store.at(store.location).read_bytes("a") == CONTENT


def test_relative_folder_survives_pickling(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store.at("corpus")
    store.write_bytes("a", CONTENT)
    content = pickle.dumps(store)
    monkeypatch.chdir("/")
    assert pickle.loads(content).read_bytes("a") == CONTENT


def test_local_files_are_linked_not_copied(tmp_path, file) -> None:
    store = Store.at(tmp_path / "corpus")
    store.put_file("a", file)
    for _ in range(2):
        store.copy("a", "b")
    assert store.local_path("b").samefile(file)
    assert sorted(os.listdir(tmp_path / "corpus")) == ["a", "b"]


def test_local_files_are_copied_where_links_do_not_work(tmp_path, file, monkeypatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    store = Store.at(tmp_path / "corpus")
    store.put_file("a", file)
    assert store.read_bytes("a") == CONTENT
    assert not store.local_path("a").samefile(file)


def test_remote_store_has_no_local_path() -> None:
    store = Store.at("memory://bucket/corpus")
    assert not store.is_local
    with pytest.raises(ValueError, match="not on local disk"):
        store.local_path("a")


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere://x: cannot be opened .*nowhere"):
        Store.at("nowhere://x")
    with pytest.raises(ConfigError, match="absolute path"):
        Store.at("file://relative/path")


# Trying again.


class Failing:
    """Raises its errors one after the other, then returns 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def try_again(action: Failing) -> int:
    return retry(action, what="s3://b/x", policy=AT_ONCE, errors=(OSError,))


def test_passing_failure_is_tried_again() -> None:
    assert try_again(Failing(OSError("reset"), ConnectionResetError("x"))) == 7


def test_last_reason_is_named_when_attempts_run_out() -> None:
    action = Failing(*(OSError(f"reason {number}") for number in range(9)))
    with pytest.raises(DataError, match=r"s3://b/x: failed 3 times .*: reason 2; check"):
        try_again(action)
    assert action.calls == 3


def test_time_runs_out_before_the_attempts() -> None:
    policy = RetryPolicy(attempts=100, first_delay_seconds=1, total_seconds=0.1)
    with pytest.raises(DataError, match="failed 1 times"):
        retry(Failing(OSError("slow")), what="x", policy=policy, errors=(OSError,))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("x"), "no such file"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), "no such file, folder or bucket"),
        (PermissionError("x"), "credentials"),
        (OSError("AWS Error ACCESS_DENIED during HeadObject"), "credentials"),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during GetObject"), "refuses"),
        (OSError("AWS Error UNKNOWN (HTTP status 301) during GetObject"), "region"),
    ],
)
def test_lasting_failure_is_not_tried_again(error, words) -> None:
    action = Failing(error)
    with pytest.raises(DataError, match=words):
        try_again(action)
    assert action.calls == 1


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error SLOW_DOWN during GetObject",
        "AWS Error UNKNOWN (HTTP status 503) during GetObject",
        "AWS Error UNKNOWN (HTTP status 429) during GetObject",
        "AWS Error UNKNOWN (HTTP status 408) during GetObject",
        "AWS Error NETWORK_CONNECTION during GetObject: curlCode: 18, partial file",
    ],
)
def test_throttling_and_broken_lines_may_pass(text) -> None:
    assert cure_for(OSError(text)) is None
