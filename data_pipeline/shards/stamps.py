"""Which files were whole when they were last read: kept per corpus in the cache of this node.

A stamp says of a file that its content had a certain sha256 while it had a certain size, inode and
times of change. Stamps can be lost without harm: the file is read once more.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from data_pipeline.storage.cache import cache_folder

# Times of change are coarse: a file that changed this short a time ago may change again unseen.
_SETTLED_NS = 2 * 10**9

Stamp = list[int | str]


class Stamps:
    """Stamps of the files of one corpus; read on entering, written on leaving.

    Two processes that check at the same time each write whole stamps; one of the two stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._old: dict[str, Stamp] = {}
        self._new: dict[str, Stamp] = {}
        self._before: dict[str, tuple[int, Stamp]] = {}

    @classmethod
    def of(cls, corpus_folder: Path) -> Self:
        """Stamps of the corpus in a local folder."""
        name = hashlib.sha256(os.fsencode(corpus_folder.resolve())).hexdigest()[:32]
        return cls(cache_folder() / "verified" / f"{name}.json")

    def vouch_for(self, path: Path, sha256: str) -> bool:
        """Whether a file had this content when it was last read, and is still the same file."""
        stamp = _stamp(path, sha256)
        self._before[path.name] = (time.time_ns(), stamp)
        if self._old.get(path.name) != stamp:
            return False
        self._new[path.name] = stamp
        return True

    def add(self, path: Path, sha256: str) -> None:
        """Stamp a file that was found to have this content since `vouch_for` was asked."""
        begun_ns, before = self._before[path.name]
        status = path.stat()
        is_settled = begun_ns - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED_NS
        if is_settled and _stamp(path, sha256) == before:
            self._new[path.name] = before

    def __enter__(self) -> Self:
        try:
            content = json.loads(self._path.read_bytes())
        except (OSError, ValueError):  # none yet, or torn: every file is read
            content = {}
        self._old = content if isinstance(content, dict) else {}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._new == self._old:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, suffix=".tmp")
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._new, file)
            os.replace(name, self._path)
        except OSError:
            return  # a cache that cannot be written costs reading once more, and no training


def _stamp(path: Path, sha256: str) -> Stamp:
    status = path.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    return [status.st_size, *times, status.st_dev, status.st_ino, sha256]
