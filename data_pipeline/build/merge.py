"""Merging the blocks of a build into a corpus: take out duplicates, number the shards, vouch.

May be killed and started again at any moment: it reads the blocks and leaves them as they are, and
the manifest is the last thing it writes.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_pipeline.build.block import SKETCH_FILE, TABLE_FILE, BlockResult, scratch_folder
from data_pipeline.build.plan import BuildPlan
from data_pipeline.build.tally import Tally
from data_pipeline.config import CorpusConfig
from data_pipeline.curation.table import CURATION_TABLE, Removal, merge_tables
from data_pipeline.errors import DataError
from data_pipeline.record import Drop, SeriesBatch
from data_pipeline.shards.index import SeriesIndex, write_index
from data_pipeline.shards.manifest import BUILDING_FOLDER, Manifest, ShardEntry, corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.writer import SHARD_PATTERN, shard_name, write_shard
from data_pipeline.similarity.duplicates import find_duplicates
from data_pipeline.storage import Store

_OPEN_SHARDS = 8

Removals = Mapping[int, Mapping[int, Removal]]
"""Which series go: by block, and by row among those that the block kept."""


def merge_blocks(
    config: CorpusConfig, plan: BuildPlan, results: Sequence[BlockResult], store: Store
) -> Manifest:
    """Make a corpus of all blocks of a plan.

    Raises:
        DataError: if no series is left, or the store takes no more.
    """
    with scratch_folder(store, "merge") as scratch:
        blocks = _Blocks(results, store, scratch)
        removals = _find_removals(config, blocks)
        tally = _count(blocks, removals)
        if not tally.sources:
            store.remove_folder(BUILDING_FOLDER)
            raise DataError(f"no series is left to write to {store}: {tally.describe_drops()}")
        shards, index = _number_shards(blocks, removals, store, scratch)
        table = scratch / "merged.parquet"
        merge_tables([blocks.path(block, TABLE_FILE) for block in blocks], removals, table)
        store.put_file(CURATION_TABLE, table)
        manifest = Manifest(
            fingerprint=corpus_fingerprint(shards, config.train_fraction),
            train_fraction=config.train_fraction,
            shards=shards,
            index=write_index(store, index),
            sources=dict(sorted(tally.sources.items())),
            drops=dict(sorted(tally.drops.items())),
            config=config.as_json(),
            config_hash=plan.config_hash,
            inputs=plan.inputs,
        )
        _remove_other_shards(store, shards)
        manifest.write(store)
    return manifest


class _Blocks:
    """The finished blocks, with their files at hand on local disk."""

    def __init__(self, results: Sequence[BlockResult], store: Store, scratch: Path) -> None:
        self.results = results
        self._store = store
        self._scratch = scratch
        self._first_rows = [
            [0, *accumulate(shard.rows for shard in result.shards)] for result in results
        ]
        self.shard = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.results)))

    def path(self, block: int, name: str) -> Path:
        """Where a file of a block lies on local disk; fetched if it did not."""
        result = self.results[block]
        if self._store.is_local:
            return self._store.local_path(result.path(name))
        local = self._scratch / f"{block:05d}" / name
        if not local.exists():
            entry = result.expected(name)
            self._store.fetch(result.path(name), local, size=entry.bytes, sha256=entry.sha256)
        return local

    def locate(self, block: int, row: int) -> tuple[SeriesBatch, int]:
        """Return the shard that holds a row of a block, and the row within it."""
        firsts = self._first_rows[block]
        shard = bisect_right(firsts, row) - 1
        return self.shard(block, shard), row - firsts[shard]

    def values(self, block: int, row: int) -> np.ndarray:
        """Values of a series."""
        shard, row_there = self.locate(block, row)
        return shard.series(row_there)

    def rows_of(self, block: int, shard: int) -> range:
        """Rows of a block that lie in one of its shards."""
        return range(*self._first_rows[block][shard : shard + 2])

    def forget(self, block: int, name: str) -> None:
        """Free the disk that a fetched file takes."""
        if not self._store.is_local:
            (self._scratch / f"{block:05d}" / name).unlink(missing_ok=True)

    def _open(self, block: int, shard: int) -> SeriesBatch:
        return open_shard(self.path(block, self.results[block].shards[shard].file))


def _find_removals(config: CorpusConfig, blocks: _Blocks) -> Removals:
    """Look for copies over all blocks; the first of each stays."""
    removals: dict[int, dict[int, Removal]] = {}
    found = find_duplicates(
        [blocks.path(block, SKETCH_FILE) for block in blocks], blocks.values, config.duplicates
    )
    for copy in found:
        shard, row = blocks.locate(copy.kept_block, copy.kept_row)
        removals.setdefault(copy.block, {})[copy.row] = Removal(
            reason=copy.reason, copy_of=shard.item_ids[row].as_py()
        )
    return removals


def _count(blocks: _Blocks, removals: Removals) -> Tally:
    """Add up what the blocks kept and dropped, and turn copies into drops."""
    tally = Tally()
    for block, result in enumerate(blocks.results):
        tally.add(result.sources, result.drops)
        for row, removal in sorted(removals.get(block, {}).items()):
            shard, row_there = blocks.locate(block, row)
            record = shard.record(row_there)
            drop = Drop(item_id=record.item_id, source=record.source, reason=removal.reason)
            tally.keep_no_longer(drop, len(record.values))
    return tally


def _number_shards(
    blocks: _Blocks, removals: Removals, store: Store, scratch: Path
) -> tuple[list[ShardEntry], SeriesIndex]:
    """Give the shards of all blocks their final names, without the series that go."""
    shards: list[ShardEntry] = []
    parts: list[SeriesIndex] = []
    for block, result in enumerate(blocks.results):
        for number, entry in enumerate(result.shards):
            rows = blocks.rows_of(block, number)
            gone = [row - rows.start for row in removals.get(block, {}) if row in rows]
            name = shard_name(len(shards))
            if len(gone) == len(rows):
                continue
            batch = blocks.shard(block, number)
            if gone:
                batch, held_out = _without(batch, entry.held_out, gone)
                kept = write_shard(scratch / name, batch.batch, held_out=held_out)
                store.put_file(name, scratch / name)
                (scratch / name).unlink()
            else:
                kept = ShardEntry(
                    file=name,
                    rows=entry.rows,
                    points=entry.points,
                    bytes=entry.bytes,
                    sha256=entry.sha256,
                    held_out=entry.held_out,
                )
                store.copy(result.path(entry.file), name)
            shards.append(kept)
            parts.append(SeriesIndex.of_shard(batch, kept.held_out))
            blocks.forget(block, entry.file)
    return shards, SeriesIndex.join(parts)


def _without(
    batch: SeriesBatch, held_out: Sequence[int], gone: Sequence[int]
) -> tuple[SeriesBatch, list[int]]:
    """Copy a shard without some of its rows, and number those that are held out anew."""
    stays = np.ones(len(batch), np.bool_)
    stays[list(gone)] = False
    rows = np.flatnonzero(stays)
    new_row = np.cumsum(stays) - 1
    still_held = [int(new_row[row]) for row in held_out if stays[row]]
    return SeriesBatch(batch.batch.take(rows)), still_held


def _remove_other_shards(store: Store, shards: Sequence[ShardEntry]) -> None:
    """Remove shards of a corpus that was here before."""
    names = {shard.file for shard in shards}
    for name in store.files():
        if "/" not in name and fnmatch(name, SHARD_PATTERN) and name not in names:
            store.remove(name)
