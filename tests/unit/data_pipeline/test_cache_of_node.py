"""The node's cache, filled from a local folder."""

import errno
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import CachedFile, FileCache
from data_pipeline.storage.cache import cache_folder
from data_pipeline.storage.local import LocalStore

SIZE = 1000


class CountingStore(LocalStore):
    """Counts the bytes that are read; may run into a full disk, or wait in the middle."""

    read = 0
    disk_is_full = 0
    """So many more times."""
    at_half: threading.Event | None = None
    go_on: threading.Event | None = None

    def chunks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        content = b"".join(super().chunks(name, start=start, size=size))
        for piece in (content[: len(content) // 2], content[len(content) // 2 :]):
            self.read += len(piece)
            yield piece
            if self.at_half is not None and self.go_on is not None:
                self.at_half.set()
                assert self.go_on.wait(10)
            if self.disk_is_full:
                self.disk_is_full -= 1
                raise OSError(errno.ENOSPC, "No space left on device")


def content(number: int) -> bytes:
    return bytes([number]) * SIZE


def sha256(number: int) -> str:
    return hashlib.sha256(content(number)).hexdigest()


@pytest.fixture
def store(tmp_path) -> CountingStore:
    store = CountingStore(tmp_path / "store")
    for number in range(8):
        store.write_bytes(str(number), content(number))
    return store


@pytest.fixture
def cache(tmp_path) -> FileCache:
    return FileCache(folder=tmp_path / "cache", limit_bytes=3 * SIZE, patience_seconds=0.05)


def hold(cache: FileCache, store: LocalStore, number: int, **options: object) -> CachedFile:
    return cache.hold(store, str(number), size=SIZE, sha256=sha256(number), **options)


def names(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir()} - {"lock"}


def test_second_time_nothing_is_read(cache, store) -> None:
    for _ in range(2):
        with hold(cache, store, 1) as file:
            assert file.path.read_bytes() == content(1)
    assert store.read == SIZE
    assert names(cache) == {sha256(1)}


def test_least_recently_used_goes_first(cache, store) -> None:
    for number in (1, 2, 3, 1, 4):
        hold(cache, store, number).close()
    assert names(cache) == {sha256(3), sha256(1), sha256(4)}
    assert cache.used_bytes() == 3 * SIZE


def test_file_in_use_stays(cache, store) -> None:
    held = [hold(cache, store, number) for number in (1, 2)]
    for number in (3, 4, 5):
        hold(cache, store, number).close()
    assert names(cache) == {sha256(1), sha256(2), sha256(5)}
    held.pop(0).close()
    hold(cache, store, 6).close()
    assert names(cache) == {sha256(2), sha256(5), sha256(6)}


def test_full_of_files_in_use_says_so(cache, store) -> None:
    held = [hold(cache, store, number) for number in (1, 2, 3)]
    with pytest.raises(DataError, match=r"/4: .* \(3000 bytes\) has no room for 1000 .*in use"):
        hold(cache, store, 4)
    hold(cache, store, 4, when_full=held[0].close).close()
    assert names(cache) == {sha256(2), sha256(3), sha256(4)}


def test_file_larger_than_the_cache_is_refused(cache, store) -> None:
    with pytest.raises(DataError, match=r"4000 bytes are more .*3000.*TSMOE_CACHE_BYTES"):
        cache.hold(store, "1", size=4 * SIZE, sha256=sha256(1))


def test_cached_file_of_wrong_size_is_fetched_again(cache, store) -> None:
    hold(cache, store, 1).close()
    (cache.folder / sha256(1)).write_bytes(b"short")
    with hold(cache, store, 1) as file:
        assert file.path.read_bytes() == content(1)


def test_damage_of_the_right_size_is_found_where_asked(cache, store) -> None:
    hold(cache, store, 1).close()
    (cache.folder / sha256(1)).write_bytes(content(2))
    with hold(cache, store, 1) as file:
        assert file.path.read_bytes() == content(2)
    with hold(cache, store, 1, checks_content=True) as file:
        assert file.path.read_bytes() == content(1)


def test_beginning_left_by_a_killed_process_is_gone_on_with(cache, store) -> None:
    cache.folder.mkdir()
    (cache.folder / f"{sha256(1)}.{SIZE}.partial").write_bytes(content(1)[:600])
    hold(cache, store, 1).close()
    assert store.read == 400
    assert names(cache) == {sha256(1)}


def test_abandoned_beginnings_count_and_make_room(cache, store) -> None:
    cache.folder.mkdir()
    (cache.folder / f"{sha256(7)}.{SIZE}.partial").write_bytes(b"x")
    assert cache.used_bytes() == SIZE
    for number in (1, 2, 3):
        hold(cache, store, number).close()
    assert names(cache) == {sha256(1), sha256(2), sha256(3)}


def test_second_reader_waits_for_the_download_of_the_first(cache, store) -> None:
    store.at_half, store.go_on = threading.Event(), threading.Event()
    found: list[bytes] = []

    def read() -> None:
        with hold(cache, store, 1) as file:
            found.append(file.path.read_bytes())

    threads = [threading.Thread(target=read) for _ in range(3)]
    threads[0].start()
    assert store.at_half.wait(10)
    for thread in threads[1:]:
        thread.start()
    cache.prefetch(store, "1", size=SIZE, sha256=sha256(1))  # does not wait
    store.go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == [content(1)] * 3
    assert store.read == SIZE


def test_download_in_progress_is_not_removed_for_another(cache, store) -> None:
    store.at_half, store.go_on = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: hold(cache, store, 1).close())
    thread.start()
    assert store.at_half.wait(10)
    other = LocalStore(store.folder)
    for number in (2, 3, 4):
        hold(cache, other, number).close()
    assert names(cache) == {f"{sha256(1)}.{SIZE}.partial", sha256(3), sha256(4)}
    store.go_on.set()
    thread.join(10)
    assert sha256(1) in names(cache)


def test_prefetch_leaves_a_full_cache_alone(cache, store) -> None:
    held = [hold(cache, store, number) for number in (1, 2, 3)]
    cache.prefetch(store, "4", size=SIZE, sha256=sha256(4))
    held[0].close()
    assert sha256(4) not in names(cache)
    cache.prefetch(store, "4", size=SIZE, sha256=sha256(4))
    assert sha256(4) in names(cache)


def test_full_disk_removes_what_nobody_uses_and_goes_on(cache, store) -> None:
    hold(cache, store, 1).close()
    store.disk_is_full = 1
    with hold(cache, store, 2) as file:
        assert file.path.read_bytes() == content(2)
    assert names(cache) == {sha256(2)}


def test_full_disk_with_nothing_to_remove_says_so(cache, store) -> None:
    store.disk_is_full = 9
    with pytest.raises(DataError, match="disk is full and the cache has nothing left"):
        hold(cache, store, 2)
    assert names(cache) == set()


def test_lock_ends_with_the_process_that_holds_it(cache, store) -> None:
    child = os.fork()
    if child == 0:
        file = hold(cache, store, 1)
        os.kill(os.getpid(), 9)
        file.close()
    os.waitpid(child, 0)
    with (cache.folder / sha256(1)).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_foreign_files_are_left_alone(cache, store) -> None:
    cache.folder.mkdir()
    (cache.folder / "notes.txt").write_bytes(b"x" * 9 * SIZE)
    for number in (1, 2, 3, 4):
        hold(cache, store, number).close()
    assert (cache.folder / "notes.txt").exists()


def test_environment_names_folder_and_limit(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TSMOE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("TSMOE_CACHE_BYTES", "12345")
    cache = FileCache.of_node()
    assert (cache.folder, cache.limit_bytes) == (tmp_path / "here" / "files", 12345)
    monkeypatch.setenv("TSMOE_CACHE_BYTES", "10 GB")
    with pytest.raises(ConfigError, match="TSMOE_CACHE_BYTES=10 GB: expected a number of bytes"):
        FileCache.of_node()
    monkeypatch.delenv("TSMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tsmoe"


def test_cache_that_cannot_be_made_is_a_config_error(monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TSMOE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be made .*set TSMOE_CACHE"):
        FileCache.of_node()


def test_paths_are_those_of_the_cache(cache, store) -> None:
    assert hold(cache, store, 1).path == Path(cache.folder / sha256(1))
