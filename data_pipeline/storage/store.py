"""A place for the files of a corpus: a local folder, or a prefix of a remote store.

A file is whole or not there, in every store. Names are relative to the place and use `/`.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import ConfigError, DamagedFileError, DataError
from data_pipeline.storage.durable import PARTIAL_SUFFIX, sync
from data_pipeline.storage.retry import RetryPolicy

CHUNK_BYTES = 8 * 2**20
_DOWNLOADS = 3  # of a whole file whose checksum is wrong, before the error is the store's own


class Store(ABC):
    """Files below one folder or URL."""

    location: str
    """Opens the same store again; may hold credentials if the user's URL does."""

    @staticmethod
    def at(where: "str | os.PathLike[str] | Store", policy: RetryPolicy | None = None) -> "Store":
        """Open a place; nothing is read or made.

        Args:
            where: a folder, a URL such as `s3://bucket/prefix`, `gs://..` or any that fsspec
                knows, or a store, which is returned as it is. S3 takes `endpoint_override`,
                `scheme`, `region` and `anonymous` as a query, and AWS's environment variables.
            policy: of requests to a remote store.

        Raises:
            ConfigError: if nothing is known of such URLs.
        """
        # Not at the top: both derive from this class, and the remote one takes time to load.
        from data_pipeline.storage.local import LocalStore

        if isinstance(where, Store):
            return where
        text = os.fspath(where)
        if "://" not in text:
            return LocalStore(Path(text))
        url = urlsplit(text)
        if url.scheme == "file":
            if url.netloc not in ("", "localhost"):
                raise ConfigError(f"{text}: file:// wants an absolute path: file:///{url.netloc}..")
            return LocalStore(Path(unquote(url.path)))
        from data_pipeline.storage.remote import RemoteStore

        return RemoteStore(text, policy or RetryPolicy())

    @abstractmethod
    def __str__(self) -> str:
        """Name the place for messages, without credentials."""

    @property
    @abstractmethod
    def is_local(self) -> bool:
        """Whether `local_path` works."""

    @abstractmethod
    def local_path(self, name: str) -> Path:
        """Where a file lies or would lie; only of a local store."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is no such file."""

    @abstractmethod
    def files(self, folder: str = "") -> dict[str, int]:
        """Names and sizes of all files in a folder and those below it, sorted by name."""

    @abstractmethod
    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file, in place of one that may be there."""

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """Take in a local file, in place of one that may be there.

        The local file stays, and may share its bytes with the one in the store: do not change it.
        """

    @abstractmethod
    def copy(self, name: str, other_name: str) -> None:
        """Give the content of a file a second name."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file if there is one."""

    @abstractmethod
    def remove_folder(self, name: str) -> None:
        """Remove a folder with all that is in it, if there is one."""

    @abstractmethod
    def chunks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        """Yield a file of `size` bytes from `start` to its end, in order.

        Raises:
            DataError: if it is missing, is not that long, or cannot be read.
        """

    def path_of(self, name: str) -> str:
        """Name a file for messages."""
        return f"{self}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.size(name) is not None

    def read_bytes(self, name: str) -> bytes:
        """Read a small file.

        Raises:
            DataError: if it is missing or cannot be read.
        """
        size = self.size(name)
        if size is None:
            raise DataError(f"{self.path_of(name)}: there is no such file")
        return b"".join(self.chunks(name, start=0, size=size))

    def fetch(self, name: str, path: Path, *, size: int, sha256: str) -> None:
        """Copy a file to local disk, whole or not at all.

        What an interrupted call left behind is gone on with.

        Raises:
            DataError: if the file is missing, is another than `sha256`, or cannot be read.
            OSError: if the local file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            self.fetch_into(file, name, size=size, sha256=sha256)
        partial.rename(path)
        sync(path.parent)

    def fetch_into(self, file: BinaryIO, name: str, *, size: int, sha256: str) -> None:
        """Complete an open local file that holds the beginning of one in the store.

        See `fetch`.
        """
        for attempt in range(1, _DOWNLOADS + 1):
            found = self._append(file, name, size)
            if found == sha256:
                os.fsync(file.fileno())
                return
            # The part that was there before may be at fault, or a proxy on the way.
            file.truncate(0)
            if attempt == _DOWNLOADS:
                raise DamagedFileError(
                    f"{self.path_of(name)}: sha256 is {found[:12]} but the manifest has "
                    f"{sha256[:12]}, {attempt} times; copy or build the corpus again"
                )

    def _append(self, file: BinaryIO, name: str, size: int) -> str:
        """Complete the file and return the hash of all of it."""
        digest = hashlib.sha256()
        if os.fstat(file.fileno()).st_size > size:
            file.truncate(0)
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        for chunk in self.chunks(name, start=file.tell(), size=size):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        return digest.hexdigest()
