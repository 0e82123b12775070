"""Checking a corpus against its manifest, byte by byte."""

from collections import Counter
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.record import SCHEMA, SeriesBatch
from data_pipeline.shards.manifest import Manifest, ShardEntry, corpus_fingerprint
from data_pipeline.shards.reader import open_shard
from data_pipeline.shards.writer import SHARD_PATTERN, file_sha256


def verify_corpus(path: str | Path) -> list[str]:
    """Read every shard and compare it with the manifest.

    Returns:
        one line per problem, naming the shard; empty if the corpus is whole.

    Raises:
        DataError: if there is no readable manifest to compare with.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    problems = manifest.check_sizes(folder)
    series_of: Counter[str] = Counter()
    points_of: Counter[str] = Counter()
    for shard in manifest.shards:
        file = folder / shard.file
        if not file.is_file() or file.stat().st_size != shard.bytes:
            continue
        if (found := file_sha256(file)) != shard.sha256:
            problems.append(
                f"{file}: the content has changed, sha256 is {found[:12]} but the manifest has "
                f"{shard.sha256[:12]}; rebuild or copy again"
            )
            continue
        try:
            batch = open_shard(file)
        except DataError as error:
            problems.append(str(error))
            continue
        problems += _check_counts(file, batch, shard)
        _count_sources(batch, series_of, points_of)
    if not problems:
        problems += _check_totals(manifest, folder, series_of, points_of)
    listed = {shard.file for shard in manifest.shards}
    problems += [
        f"{file}: the shard is not in the manifest; remove it"
        for file in sorted(folder.glob(SHARD_PATTERN))
        if file.name not in listed
    ]
    return problems


def _check_counts(file: Path, batch: SeriesBatch, shard: ShardEntry) -> list[str]:
    if not batch.batch.schema.equals(SCHEMA):
        return [f"{file}: columns are not those of a corpus; rebuild"]
    found = (len(batch), len(batch.values))
    if found == (shard.rows, shard.points):
        return []
    return [
        f"{file}: {found[0]} rows and {found[1]} points, but the manifest has {shard.rows} and "
        f"{shard.points}; rebuild"
    ]


def _count_sources(batch: SeriesBatch, series_of: Counter[str], points_of: Counter[str]) -> None:
    lengths = np.diff(batch.offsets)
    sources = batch.sources
    indices = sources.indices.to_numpy()
    for position, name in enumerate(sources.dictionary.to_pylist()):
        rows = indices == position
        series_of[name] += int(rows.sum())
        points_of[name] += int(lengths[rows].sum())


def _check_totals(
    manifest: Manifest, folder: Path, series_of: Counter[str], points_of: Counter[str]
) -> list[str]:
    problems = []
    expected = corpus_fingerprint(
        [shard.sha256 for shard in manifest.shards], manifest.train_fraction
    )
    if expected != manifest.fingerprint:
        problems.append(
            f"{folder}: the manifest has fingerprint {manifest.fingerprint[:12]}, but its shards "
            f"and train_fraction give {expected[:12]}; the manifest was edited, rebuild"
        )
    for name in sorted(manifest.sources.keys() | series_of.keys()):
        entry = manifest.sources.get(name)
        listed = (entry.series, entry.points) if entry else (0, 0)
        if listed != (series_of[name], points_of[name]):
            problems.append(
                f"{folder}: source {name!r} has {series_of[name]} series and {points_of[name]} "
                f"points, but the manifest has {listed[0]} and {listed[1]}; rebuild"
            )
    return problems
