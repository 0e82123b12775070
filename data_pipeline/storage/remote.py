"""A prefix of a remote store: S3, GCS, Azure and HDFS by pyarrow, all else by fsspec.

One policy holds for every request: pyarrow tries a read once where that can be set.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from data_pipeline.errors import ConfigError, DamagedFileError
from data_pipeline.storage.durable import PARTIAL_SUFFIX
from data_pipeline.storage.retry import Attempts, RetryPolicy, is_missing, retry
from data_pipeline.storage.store import CHUNK_BYTES, Store

Result = TypeVar("Result")

_OF_ARROW = ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
# Where a file appears when its upload is complete; elsewhere it grows under its name.
_APPEARS_WHOLE = ("s3", "gcs", "abfs", "az", "adl", "memory")
_MIN_CHUNK_BYTES = 256 * 2**10
_CONNECT_SECONDS = 10.0
# What S3 takes as a query, as pyarrow's URLs have it.
_S3_QUERY = ("region", "scheme", "endpoint_override", "tls_ca_file_path", "anonymous")
_CREDENTIALS = re.compile(r"(?<=://)[^/@]*@|\?.*$")


@dataclass(frozen=True)
class _Connection:
    """What requests go through, in one process."""

    pid: int
    reader: fs.FileSystem
    """Tries each request once."""
    writer: fs.FileSystem
    """Tries each part of an upload several times: our policy would begin with the first part."""
    root: str

    def path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/")


class RemoteStore(Store):
    """Files below a URL. Can be pickled, and used after a fork."""

    def __init__(self, url: str, policy: RetryPolicy) -> None:
        self.location = url.rstrip("/")
        self._policy = policy
        self._connection: _Connection | None = None
        self._connect()  # an unknown scheme or query shows at once

    def __str__(self) -> str:
        return _CREDENTIALS.sub("", self.location).rstrip("/")

    def __reduce__(self) -> tuple[object, tuple[str, RetryPolicy]]:
        return RemoteStore, (self.location, self._policy)

    @property
    def is_local(self) -> bool:
        return False

    def local_path(self, name: str) -> Path:
        raise ValueError(f"{self.path_of(name)} is not on local disk; fetch it")

    def size(self, name: str) -> int | None:
        info = self._try(name, lambda filesystem, path: filesystem.get_file_info(path))
        return info.size if info.type == fs.FileType.File else None

    def files(self, folder: str = "") -> dict[str, int]:
        found = self._try(folder, _list_files)
        # The folder itself is a file where an object store marks it as one.
        return dict(sorted((f"{folder}/{name}".lstrip("/"), size) for name, size in found if name))

    def write_bytes(self, name: str, content: bytes) -> None:
        self._upload(name, lambda: [content], len(content))

    def put_file(self, name: str, path: Path) -> None:
        self._upload(name, lambda: _pieces(path), path.stat().st_size)

    def copy(self, name: str, other_name: str) -> None:
        target = self._connect().path(other_name)
        self._try(name, lambda filesystem, path: filesystem.copy_file(path, target))

    def remove(self, name: str) -> None:
        self._try(name, _delete_file)

    def remove_folder(self, name: str) -> None:
        self._try(name, _delete_folder)

    def chunks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        position = start
        # Halved when a connection breaks: one that never lives long still gets somewhere.
        chunk_bytes = CHUNK_BYTES
        attempts = Attempts(self._policy, self.path_of(name))
        file = None
        while True:
            try:
                if file is None:
                    file = self._open(name, size)
                if position >= size:
                    return
                chunk = file.read_at(min(chunk_bytes, size - position), position)
                if not chunk:
                    raise OSError(f"the connection ended {size - position} bytes early")
            except self._errors as error:
                file = None
                chunk_bytes = max(_MIN_CHUNK_BYTES, chunk_bytes // 2)
                attempts.failed(error)
                continue
            yield chunk
            position += len(chunk)
            chunk_bytes = min(CHUNK_BYTES, chunk_bytes * 2)
            attempts = Attempts(self._policy, self.path_of(name))

    def _open(self, name: str, size: int) -> pa.NativeFile:
        connection = self._connect()
        file = connection.reader.open_input_file(connection.path(name))
        if file.size() != size:
            raise DamagedFileError(
                f"{self.path_of(name)}: expected {size} bytes but found {file.size()}; copy or "
                f"build the corpus again"
            )
        return file

    def _upload(self, name: str, pieces: Callable[[], Iterable[bytes]], size: int) -> None:
        def upload(filesystem: fs.FileSystem, path: str) -> None:
            appears_whole = any(kind in filesystem.type_name for kind in _APPEARS_WHOLE)
            if not appears_whole:
                filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            written = path if appears_whole else path + PARTIAL_SUFFIX
            # Closing after an error would make a file of what had arrived; so would letting go of
            # the stream. Therefore the size is checked, and a file of another size is removed.
            try:
                with filesystem.open_output_stream(written, compression=None) as stream:
                    for piece in pieces():
                        stream.write(piece)
            except self._errors:
                _remove_unless_whole(filesystem, written, size)
                raise
            if (found := filesystem.get_file_info(written).size) != size:
                _delete_file(filesystem, written)
                raise OSError(f"{found} of {size} bytes arrived")
            if not appears_whole:
                _delete_file(filesystem, path)  # not every store renames onto a file
                filesystem.move(written, path)

        self._try(name, upload, writes=True)

    def _try(
        self, name: str, action: Callable[[fs.FileSystem, str], Result], *, writes: bool = False
    ) -> Result:
        connection = self._connect()
        filesystem = connection.writer if writes else connection.reader
        return retry(
            lambda: action(filesystem, connection.path(name)),
            what=self.path_of(name),
            policy=self._policy,
            errors=self._errors,
        )

    @cached_property
    def _errors(self) -> tuple[type[Exception], ...]:
        if isinstance(self._connect().reader, fs.PyFileSystem):
            return (Exception,)  # each back end of fsspec has exceptions of its own
        return (OSError, pa.ArrowException)

    def _connect(self) -> _Connection:
        """Connect, once in each process: connections do not outlive a fork."""
        if self._connection is None or self._connection.pid != os.getpid():
            try:
                reader, path = _open_filesystem(self.location, attempts=1)
                writer, _ = _open_filesystem(self.location, attempts=self._policy.attempts)
            except (ValueError, ImportError, NotImplementedError, OSError) as error:
                reason = " ".join(str(error).split())
                raise ConfigError(f"{self}: cannot be opened ({reason}); check the URL") from error
            self._connection = _Connection(os.getpid(), reader, writer, path.rstrip("/"))
        return self._connection


def _open_filesystem(url: str, *, attempts: int) -> tuple[fs.FileSystem, str]:
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        return _open_s3(url, attempts=attempts)
    if scheme in _OF_ARROW:
        return fs.FileSystem.from_uri(url)
    import fsspec

    filesystem, path = fsspec.core.url_to_fs(url)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _open_s3(url: str, *, attempts: int) -> tuple[fs.FileSystem, str]:
    """Open S3 with a number of attempts, which pyarrow's own URLs do not take."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := sorted(query.keys() - set(_S3_QUERY)):
        raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(_S3_QUERY)}")
    settings: dict[str, Any] = dict(query)  # Any: strings, and one bool
    # pyarrow reads the other variables of AWS, but these only when it is given a URL.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        settings.setdefault("endpoint_override", endpoint)
    if "anonymous" in query:
        settings["anonymous"] = query["anonymous"].lower() in ("1", "true", "yes")
    if parts.username is not None:
        settings |= {
            "access_key": unquote(parts.username),
            "secret_key": unquote(parts.password or ""),
        }
    filesystem = fs.S3FileSystem(
        **settings,
        connect_timeout=_CONNECT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket:
        raise ValueError("no bucket is named, as in s3://bucket/prefix")
    return filesystem, bucket + parts.path


def _list_files(filesystem: fs.FileSystem, path: str) -> list[tuple[str, int]]:
    selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
    infos = filesystem.get_file_info(selector)
    root = path.strip("/") + "/"
    return [
        (info.path.lstrip("/").removeprefix(root), info.size)
        for info in infos
        if info.type == fs.FileType.File and not info.path.endswith(("/", PARTIAL_SUFFIX))
    ]


def _delete_file(filesystem: fs.FileSystem, path: str) -> None:
    try:
        filesystem.delete_file(path)
    except OSError as error:
        if not is_missing(error):
            raise


def _delete_folder(filesystem: fs.FileSystem, path: str) -> None:
    try:
        filesystem.delete_dir(path)
    except OSError as error:
        if not is_missing(error):
            raise


def _remove_unless_whole(filesystem: fs.FileSystem, path: str, size: int) -> None:
    """Remove what a failed upload may have left, if the store can be reached at all."""
    try:
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File and info.size != size:
            filesystem.delete_file(path)
    except OSError:
        return  # the caller raises the first failure, which says more


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
