"""A folder on local disk, or on one that is mounted."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import DamagedFileError, DataError
from data_pipeline.storage.durable import PARTIAL_SUFFIX, durable_file
from data_pipeline.storage.store import CHUNK_BYTES, Store

# What a file system answers that has no hard links, or not between these two places.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)


class LocalStore(Store):
    """Files below a folder, which is made when the first is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = os.fspath(folder)

    def __str__(self) -> str:
        return self.location

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return LocalStore, (self.folder.absolute(),)  # the copy may live in another folder

    @property
    def is_local(self) -> bool:
        return True

    def local_path(self, name: str) -> Path:
        return self.folder / name

    def size(self, name: str) -> int | None:
        path = self.folder / name
        try:
            return path.stat().st_size if path.is_file() else None
        except FileNotFoundError:  # removed in between
            return None

    def files(self, folder: str = "") -> dict[str, int]:
        found = {}
        for parent, _, names in os.walk(self.folder / folder):
            for name in names:
                path = Path(parent, name)
                size = self.size(path.relative_to(self.folder).as_posix())
                if size is not None and not name.endswith(PARTIAL_SUFFIX):
                    found[path.relative_to(self.folder).as_posix()] = size
        return dict(sorted(found.items()))

    def write_bytes(self, name: str, content: bytes) -> None:
        path = self._prepared(name)
        with durable_file(path, len(content)) as partial:
            partial.write_bytes(content)

    def put_file(self, name: str, path: Path) -> None:
        with durable_file(self._prepared(name), path.stat().st_size) as partial:
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                shutil.copyfile(path, partial)

    def copy(self, name: str, other_name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise DataError(f"{path}: there is no such file")
        self.put_file(other_name, path)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        folder = self.folder / name
        if folder.is_dir():
            shutil.rmtree(folder)

    def chunks(self, name: str, *, start: int, size: int) -> Iterator[bytes]:
        path = self.folder / name
        found = self.size(name)
        if found != size:
            what = (
                "there is no such file" if found is None else f"expected {size} bytes, not {found}"
            )
            raise DamagedFileError(f"{path}: {what}; rebuild or copy again")
        try:
            with path.open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}); check the disk") from error

    def _prepared(self, name: str) -> Path:
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error}); check the folder") from error
        return path
