"""Remote files on the disk of this node: downloaded once, checked once, shared by its processes.

A file is named after its sha256, so it is never out of date. Everything is decided by the kernel's
file locks, which end with the process that holds them:

- `<sha256>` is a whole file. Whoever reads it holds a shared lock on it, and a file that somebody
  holds is not removed. (A view of a mapped file that outlives its lock stays readable even when the
  file is removed: Linux frees the space with the last mapping.)
- `<sha256>.<size>.partial` is a download. Whoever writes it holds an exclusive lock on it, and the
  others wait for that. It counts with its final size from the start. When its writer is killed the
  next process takes the lock and goes on where it ended.
- `lock` guards the sum of all sizes.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage.durable import PARTIAL_SUFFIX, is_full, sync
from data_pipeline.storage.store import CHUNK_BYTES, Store

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TSMOE_CACHE"
LIMIT_VARIABLE = "TSMOE_CACHE_BYTES"
DEFAULT_LIMIT_BYTES = 64 * 2**30
_LOCK_FILE = "lock"
_FILE_NAME = re.compile(rf"[0-9a-f]{{64}}(\.(?P<size>\d+){re.escape(PARTIAL_SUFFIX)})?")
_POLL_SECONDS = 0.1


class CachedFile:
    """A file of the cache that stays there until it is closed or its process ends."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Let the cache remove the file when it needs the space."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class FileCache:
    """A bounded cache of files of remote stores."""

    folder: Path
    limit_bytes: int
    patience_seconds: float = 60.0
    """How long to wait for other processes to let go of files when there is no room."""

    @classmethod
    def of_node(cls) -> "FileCache":
        """The cache that the environment names: `TSMOE_CACHE`, `TSMOE_CACHE_BYTES`.

        Raises:
            ConfigError: if the limit is no number of bytes, or the folder cannot be made.
        """
        folder = cache_folder() / "files"
        text = os.environ.get(LIMIT_VARIABLE)
        if text and not (text.isdecimal() and int(text) > 0):
            raise ConfigError(f"{LIMIT_VARIABLE}={text}: expected a number of bytes")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{folder}: the cache cannot be made ({error.strerror}); set {FOLDER_VARIABLE}"
            ) from error
        if text:
            return cls(folder=folder, limit_bytes=int(text))
        # On a small disk, leave half of what is free to others.
        spare = shutil.disk_usage(folder).free + sum(size for size, *_ in _entries(folder))
        return cls(folder=folder, limit_bytes=min(DEFAULT_LIMIT_BYTES, spare // 2))

    def hold(
        self,
        store: Store,
        name: str,
        *,
        size: int,
        sha256: str,
        checks_content: bool = False,
        when_full: Callable[[], None] | None = None,
    ) -> CachedFile:
        """Download a file unless it is here, and keep it here until it is closed.

        Args:
            store: where it lies.
            name: its name there.
            size: its bytes.
            sha256: of its content.
            checks_content: also read a file that is here already, and replace it if it is damaged;
                else only its size is compared.
            when_full: called once when all of the cache is in use, to let go of what the caller
                itself holds.

        Raises:
            DataError: if it is larger than the cache, there is no room, the disk is full, or the
                store has no such file or another one.
        """
        what = store.path_of(name)
        if size > self.limit_bytes:
            raise DataError(
                f"{what}: its {size} bytes are more than the cache {self.folder} may hold "
                f"({self.limit_bytes}); raise {LIMIT_VARIABLE}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / sha256
        deadline = None
        while True:
            held = self._held_if_whole(path, size, sha256 if checks_content else None)
            if held is not None:
                return held
            partial = self._begin(path, size, waits=True)
            if partial is not None:
                with partial:
                    self._download(partial, store, name, size=size, sha256=sha256)
            if partial is not None or path.exists():
                deadline = None
                continue
            now = time.monotonic()
            if deadline is None:
                deadline = now + self.patience_seconds
                if when_full is not None:
                    when_full()
                    continue
            if now >= deadline:
                raise DataError(
                    f"{what}: the cache {self.folder} ({self.limit_bytes} bytes) has no room for "
                    f"{size} bytes, all of it is in use; raise {LIMIT_VARIABLE}, or hold fewer "
                    f"shards at a time (data.resident_shards)"
                )
            time.sleep(_POLL_SECONDS)

    def prefetch(self, store: Store, name: str, *, size: int, sha256: str) -> None:
        """Download a file, unless it is here, another process is at it, or there is no room.

        Raises:
            DataError: if the store has no such file or another one, or cannot be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / sha256
        if size > self.limit_bytes or path.exists():
            return
        partial = self._begin(path, size, waits=False)
        if partial is not None:
            with partial:
                self._download(partial, store, name, size=size, sha256=sha256)

    def used_bytes(self) -> int:
        """Count what is here, downloads with their final size."""
        return sum(size for size, *_ in _entries(self.folder))

    def _held_if_whole(self, path: Path, size: int, sha256: str | None) -> CachedFile | None:
        """Lock a file if it is here and sound; remove one that is not."""
        descriptor = _lock(path, os.O_RDONLY, fcntl.LOCK_SH)
        if descriptor is None:
            return None
        held = CachedFile(path, descriptor)
        found = os.fstat(descriptor).st_size
        if found == size and (sha256 is None or _sha256(path) == sha256):
            os.utime(descriptor)  # the least recently used goes first
            return held
        logger.warning("%s: the cached file is damaged and is fetched again", path)
        # Also from under those who use it: what they have mapped stays readable, damaged as it is.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            path.unlink(missing_ok=True)
        held.close()
        return None

    def _begin(self, path: Path, size: int, *, waits: bool) -> CachedFile | None:
        """Reserve room and lock the file to download to.

        None if the file has arrived meanwhile, there is no room, or another process downloads it
        and this one does not wait for that.
        """
        partial = path.with_name(f"{path.name}.{size}{PARTIAL_SUFFIX}")
        while True:
            descriptor = _lock(partial, os.O_RDWR, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            if descriptor is not None:
                return CachedFile(partial, descriptor)
            if not waits and partial.exists():
                return None
            with self._sizes_locked():
                if partial.exists():
                    continue
                if path.exists() or not self._make_room(size):
                    return None
                os.close(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644))
                # Without waiting: whoever was quicker may want the lock of sizes next.
                descriptor = _lock(partial, os.O_RDWR, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if descriptor is not None:
                    return CachedFile(partial, descriptor)

    def _download(
        self, partial: CachedFile, store: Store, name: str, *, size: int, sha256: str
    ) -> None:
        if (self.folder / sha256).exists():
            partial.path.unlink(missing_ok=True)
            return
        while True:
            try:
                with partial.path.open("r+b") as file:
                    store.fetch_into(file, name, size=size, sha256=sha256)
                break
            except OSError as error:
                if not is_full(error):
                    raise DataError(
                        f"{partial.path}: cannot be written ({error}); check {FOLDER_VARIABLE}"
                    ) from error
                with self._sizes_locked():
                    is_freed = self._evict(size) > 0
                if not is_freed:
                    partial.path.unlink(missing_ok=True)
                    raise DataError(
                        f"{partial.path}: the disk is full and the cache has nothing left to "
                        f"remove; free space, or set {FOLDER_VARIABLE} to a folder on another disk"
                    ) from error
        partial.path.replace(self.folder / sha256)
        sync(self.folder)

    def _make_room(self, size: int) -> bool:
        """Remove files that nobody uses until `size` bytes more fit; under the lock of sizes."""
        excess = self.used_bytes() + size - self.limit_bytes
        return excess <= 0 or self._evict(excess) >= excess

    def _evict(self, num_bytes: int) -> int:
        """Remove the files that nobody used for longest; return the bytes that were freed."""
        freed = 0
        for size, _, path in sorted(_entries(self.folder), key=lambda entry: entry[1]):
            if freed >= num_bytes:
                break
            descriptor = _lock(path, os.O_RDONLY, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is None:
                continue  # in use, or gone
            try:
                path.unlink(missing_ok=True)
                freed += size
            finally:
                os.close(descriptor)
        return freed

    @contextmanager
    def _sizes_locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def cache_folder() -> Path:
    """Where this node keeps what can be had again: `TSMOE_CACHE`, or below the user's caches."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        return Path(folder).expanduser().absolute()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser().absolute() / "tsmoe"


def _lock(path: Path, flags: int, kind: int) -> int | None:
    """Open and lock a file; None if it is not there, or locked where `kind` does not wait."""
    while True:
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, kind)
            # While waiting, the name may have passed to another file, or to none.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _entries(folder: Path) -> list[tuple[int, int, Path]]:
    """Size (of a download: the final one), time of last use and path of every file."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            match = _FILE_NAME.fullmatch(entry.name)
            if match is None:
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            size = int(match["size"]) if match["size"] else status.st_size
            found.append((size, status.st_mtime_ns, Path(entry.path)))
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
