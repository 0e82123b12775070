"""Downloads ahead of need, by a few threads that never hold up the end of a process."""

import logging
import os
import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.errors import DataError
from data_pipeline.storage.cache import FileCache
from data_pipeline.storage.store import Store

logger = logging.getLogger(__name__)

_DOWNLOADS_AT_A_TIME = 4


@dataclass(frozen=True, kw_only=True)
class WantedFile:
    """A file of a store, as a manifest describes it."""

    name: str
    size: int
    sha256: str


class Prefetcher:
    """Brings files of a store into the cache in the background, in the order they are asked for.

    What fails here is tried again by whoever needs the file.
    """

    def __init__(self, store: Store, cache: FileCache) -> None:
        self._store = store
        self._cache = cache
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._queue: queue.SimpleQueue[WantedFile | None] = queue.SimpleQueue()
        self._num_threads = 0

    def ask(self, files: Iterable[WantedFile]) -> None:
        """Queue those files that are not queued already; returns at once."""
        with self._lock:
            for file in files:
                if file.name not in self._asked:
                    self._asked.add(file.name)
                    self._queue.put(file)
            while self._num_threads < min(_DOWNLOADS_AT_A_TIME, len(self._asked)):
                self._num_threads += 1
                # The threads do not hold this object, so that it can end them when it goes; they
                # are daemons, so that a process may end in the middle of a download.
                threading.Thread(
                    target=_fetch,
                    args=(self._queue, self._lock, self._asked, self._store, self._cache),
                    daemon=True,
                    name="prefetch",
                ).start()

    def __del__(self) -> None:
        if self._pid == os.getpid():  # a fork has no threads to end, and may have a locked queue
            for _ in range(self._num_threads):
                self._queue.put(None)


def _fetch(
    wanted: "queue.SimpleQueue[WantedFile | None]",
    lock: threading.Lock,
    asked: set[str],
    store: Store,
    cache: FileCache,
) -> None:
    while (file := wanted.get()) is not None:
        try:
            cache.prefetch(store, file.name, size=file.size, sha256=file.sha256)
        except DataError as error:
            logger.warning("not fetched ahead of time: %s", error)
        with lock:
            asked.discard(file.name)
