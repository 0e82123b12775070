"""The shards that a process has mapped: all of a local corpus, a bounded part of a remote one.

Shards are mapped when they are first asked for. Those of a remote corpus come through the node's
cache, where they are held while they are mapped here: the ones used last, up to half of the cache,
so that the processes of a node that read the same shards always find room for the next.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.errors import DamagedFileError, ShardError
from data_pipeline.record import SeriesBatch
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.storage.cache import CachedFile, FileCache
from data_pipeline.storage.prefetch import Prefetcher, WantedFile
from data_pipeline.storage.store import Store


class ResidentShards:
    """Shards by number. May be used by several threads, and after a fork.

    Args:
        store: where they lie.
        shards: all of them, in order.
        cache: of a store that is not local.
    """

    def __init__(self, store: Store, shards: Sequence[ShardEntry], cache: FileCache | None) -> None:
        self._store = store
        self._shards = shards
        self._cache = cache
        self._local: dict[int, SeriesBatch] = {}
        self._mapped: OrderedDict[int, tuple[SeriesBatch, CachedFile]] = OrderedDict()
        self._prefetcher: Prefetcher | None = None
        self._begin()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> SeriesBatch:
        """Return a shard, mapping it or fetching it first if need be.

        Raises:
            ShardError: if it is missing or damaged.
            DataError: if it cannot be had for now, as where a remote store does not answer.
        """
        try:
            return self._get(number)
        except DamagedFileError as error:
            raise ShardError(str(error), shard=number) from error

    def _get(self, number: int) -> SeriesBatch:
        if self._cache is None:
            batch = self._local.get(number)
            if batch is None:
                file = self._shards[number].file
                # A shard stays at the address of its first mapping, whichever thread made it.
                batch = self._local.setdefault(number, open_shard(self._store.local_path(file)))
            return batch
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            mapped = self._mapped.get(number)
            if mapped is not None:
                self._mapped.move_to_end(number)
                return mapped[0]
        return self._map(number, self._cache)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to bring shards onto this node in the background, in this order; returns at once.

        Nothing to do for a local corpus.
        """
        if self._cache is None:
            return
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            if self._prefetcher is None:
                self._prefetcher = Prefetcher(self._store, self._cache)
            entries = [self._shards[number] for number in numbers if number not in self._mapped]
        self._prefetcher.ask(
            WantedFile(name=entry.file, size=entry.bytes, sha256=entry.sha256) for entry in entries
        )

    def _begin(self) -> None:
        """Start with nothing: locks and threads of the process that forked are not this one's."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._mapped = OrderedDict()
        self._prefetcher = None

    def _map(self, number: int, cache: FileCache) -> SeriesBatch:
        entry = self._shards[number]
        held = cache.hold(
            self._store,
            entry.file,
            size=entry.bytes,
            sha256=entry.sha256,
            when_full=self._let_go_of_all,
        )
        batch = open_shard(held.path, name=self._store.path_of(entry.file))
        with self._lock:
            if number in self._mapped:  # another thread was quicker
                held.close()
                return self._mapped[number][0]
            self._mapped[number] = (batch, held)
            self._let_go_of_oldest(cache.limit_bytes // 2)
        return batch

    def _let_go_of_oldest(self, limit_bytes: int) -> None:
        """Keep the shards used last; under the lock."""
        total = sum(self._shards[number].bytes for number in self._mapped)
        while total > limit_bytes and len(self._mapped) > 1:
            number, (_, held) = self._mapped.popitem(last=False)
            held.close()
            total -= self._shards[number].bytes

    def _let_go_of_all(self) -> None:
        with self._lock:
            for _, held in self._mapped.values():
                held.close()
            self._mapped.clear()


def open_shard(path: Path, *, name: str | None = None) -> SeriesBatch:
    """Memory-map one shard.

    Args:
        path: of the file on local disk.
        name: of the file, for messages, where that is another.

    Raises:
        DamagedFileError: if it is no Arrow file, or does not hold exactly one record batch.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        num_batches = file.num_record_batches
        batch = file.get_batch(0) if num_batches == 1 else None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DamagedFileError(
            f"{name or path}: the shard cannot be read ({reason}); rebuild or copy again"
        ) from error
    if batch is None:
        raise DamagedFileError(
            f"{name or path}: the shard has {num_batches} record batches, expected 1; rebuild or "
            f"copy again"
        )
    return SeriesBatch(batch)
