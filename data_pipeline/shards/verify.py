"""Checking a corpus against its manifest, byte by byte, or where its files have changed since."""

import fnmatch
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.record import SCHEMA, SeriesBatch
from data_pipeline.shards.index import SeriesIndex, read_index
from data_pipeline.shards.manifest import Manifest, ShardEntry, corpus_fingerprint
from data_pipeline.shards.reader import Corpus, open_shard
from data_pipeline.shards.stamps import Stamps
from data_pipeline.shards.writer import SHARD_PATTERN, file_sha256
from data_pipeline.storage.cache import cache_folder
from data_pipeline.storage.store import Store


def verify_corpus(where: str | Path | Store) -> list[str]:
    """Read every shard and compare it with the manifest; of a remote corpus one at a time.

    Returns:
        one line per problem, naming the shard; empty if the corpus is whole.

    Raises:
        DataError: if there is no readable manifest to compare with.
    """
    store = Store.at(where)
    manifest = Manifest.read(store)
    problems = manifest.check_sizes(store)
    is_of_size = _names_of_right_size(store, manifest, problems)
    found = []
    for shard in manifest.shards:
        if shard.file not in is_of_size:
            continue
        try:
            with _fetched(store, shard.file, size=shard.bytes, sha256=shard.sha256) as path:
                _check_hash(store, path, shard.file, shard.sha256)
                batch = open_shard(path, name=store.path_of(shard.file))
                _check_counts(store, batch, shard)
                found.append(SeriesIndex.of_shard(batch, shard.held_out))
        except DataError as error:
            problems.append(str(error))
    if not problems:
        index = SeriesIndex.join(found)
        problems += _check_totals(store, manifest, index)
        problems += _check_index(store, manifest, index)
    return problems + _unlisted_shards(store, manifest)


def verify_changed(corpus: Corpus) -> list[str]:
    """Check what may have changed since it was last checked on this node, and read the rest not.

    A shard that was whole once is not read again while its file is the same: size, times and inode
    tell. Shards of a remote corpus are checked when they arrive in the cache; here only whether all
    are there. To be called by one process of a node.

    Returns:
        one line per problem; empty if none was found.
    """
    try:
        problems = list(find_damaged(corpus).values())
    except DataError as error:  # a remote store that does not answer is a problem as any other
        return [str(error)]
    return problems or _check_totals(corpus.store, corpus.manifest, corpus.index)


def find_damaged(corpus: Corpus) -> dict[str, str]:
    """Say what is wrong with each damaged file of a corpus, checked as `verify_changed` does.

    Raises:
        DataError: if the store does not answer.
    """
    store, manifest = corpus.store, corpus.manifest
    problems = manifest.find_wrong_sizes(store)
    if store.is_local:
        files = {shard.file: shard.sha256 for shard in manifest.shards}
        if manifest.index is not None:
            files[manifest.index.file] = manifest.index.sha256
        with Stamps.of(store.local_path("")) as stamps:
            for name, sha256 in files.items():
                if name in problems:
                    continue
                path = store.local_path(name)
                try:
                    if not stamps.vouch_for(path, sha256):
                        _check_hash(store, path, name, sha256)
                        stamps.add(path, sha256)
                except DataError as error:
                    problems[name] = str(error)
    return problems


@contextmanager
def _fetched(store: Store, name: str, *, size: int, sha256: str) -> Iterator[Path]:
    """Give the path of a file on local disk; one that was fetched for this is removed."""
    if store.is_local:
        yield store.local_path(name)
        return
    # Not from the cache: that would check the copy, not the store.
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="verify-") as scratch:
        path = Path(scratch, "file")
        store.fetch(name, path, size=size, sha256=sha256)
        yield path


def _names_of_right_size(store: Store, manifest: Manifest, problems: list[str]) -> set[str]:
    wrong = {problem.partition(": ")[0] for problem in problems}
    return {shard.file for shard in manifest.shards if store.path_of(shard.file) not in wrong}


def _check_hash(store: Store, path: Path, name: str, sha256: str) -> None:
    if (found := file_sha256(path)) != sha256:
        raise DataError(
            f"{store.path_of(name)}: the content has changed, sha256 is {found[:12]} but the "
            f"manifest has {sha256[:12]}; rebuild or copy again"
        )


def _check_counts(store: Store, batch: SeriesBatch, shard: ShardEntry) -> None:
    name = store.path_of(shard.file)
    if not batch.batch.schema.equals(SCHEMA):
        raise DataError(f"{name}: columns are not those of a corpus; rebuild")
    found = (len(batch), len(batch.values))
    if found != (shard.rows, shard.points):
        raise DataError(
            f"{name}: {found[0]} rows and {found[1]} points, but the manifest has {shard.rows} and "
            f"{shard.points}; rebuild"
        )
    if any(row >= len(batch) for row in shard.held_out):
        raise DataError(f"{name}: the manifest holds out row {max(shard.held_out)}; rebuild")
    if (batch.offsets[0], batch.offsets[-1]) != (0, len(batch.values)):
        raise DataError(f"{name}: values stand before or after those of the series; rebuild")


def _check_index(store: Store, manifest: Manifest, found: SeriesIndex) -> list[str]:
    """Compare the series index with what the shards say."""
    entry = manifest.index
    if entry is None:
        return []
    name = store.path_of(entry.file)
    try:
        with _fetched(store, entry.file, size=entry.bytes, sha256=entry.sha256) as path:
            _check_hash(store, path, entry.file, entry.sha256)
            index = read_index(path, name=name, num_series=manifest.num_series)
    except DataError as error:
        return [str(error)]
    return [] if index.equals(found) else [f"{name}: is not the index of these shards; rebuild"]


def _check_totals(store: Store, manifest: Manifest, index: SeriesIndex) -> list[str]:
    problems = []
    expected = corpus_fingerprint(manifest.shards, manifest.train_fraction)
    if expected != manifest.fingerprint:
        problems.append(
            f"{store}: the manifest has fingerprint {manifest.fingerprint[:12]}, but its shards "
            f"and train_fraction give {expected[:12]}; the manifest was edited, rebuild"
        )
    num_series = np.bincount(index.source_ids, minlength=len(index.sources))
    num_points = np.bincount(index.source_ids, index.lengths, minlength=len(index.sources))
    counts = dict(zip(index.sources, zip(num_series, num_points, strict=True), strict=True))
    for name in sorted(manifest.sources.keys() | counts.keys()):
        entry = manifest.sources.get(name)
        listed = (entry.series, entry.points) if entry else (0, 0)
        found = tuple(int(number) for number in counts.get(name, (0, 0)))
        if listed != found:
            problems.append(
                f"{store}: source {name!r} has {found[0]} series and {found[1]} points, but the "
                f"manifest has {listed[0]} and {listed[1]}; rebuild"
            )
    return problems


def _unlisted_shards(store: Store, manifest: Manifest) -> list[str]:
    listed = {shard.file for shard in manifest.shards}
    return [
        f"{store.path_of(name)}: the shard is not in the manifest; remove it"
        for name in store.files()
        if fnmatch.fnmatch(name, SHARD_PATTERN) and name not in listed
    ]
