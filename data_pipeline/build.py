"""Building a corpus: sources -> steps -> shards -> manifest. Read `build_corpus` first.

Everything streams; memory is bounded by one shard (and by one series, if that is larger). Until
the manifest is written, a file named BUILDING marks the folder as unfinished.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.progress import Progress, SilentProgress
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.storage.durable import PARTIAL_SUFFIX
from data_pipeline.shards.manifest import (
    BUILDING_FILE,
    MANIFEST_FILE,
    MAX_EXAMPLES,
    InputFile,
    Manifest,
    ReasonDrops,
    SourceDrops,
    SourceEntry,
    corpus_fingerprint,
)
from data_pipeline.shards.writer import SHARD_PATTERN, ShardWriter
from data_pipeline.sources import SourceConfig
from data_pipeline.steps.clean import Cleaner
from data_pipeline.steps.quality import QualityConfig, measure

logger = logging.getLogger(__name__)


def build_corpus(
    config: CorpusConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Build a corpus folder, or leave it alone if it is up to date.

    Args:
        config: what to build.
        out: the folder; made if it does not exist.
        overwrite: replace a corpus in `out` that was built from something else.
        progress: told about every series that is kept.

    Raises:
        ConfigError: if `out` holds something else, or a source names no files.
        DataError: if a source cannot be read, the disk is full, or no series is left.
    """
    folder = Path(out)
    inputs = _input_files(config)
    current = up_to_date_manifest(config, folder, inputs)
    if current is not None and not overwrite:
        logger.info("%s is up to date: %d series", folder, current.num_series)
        return current
    _check_replaceable(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with _unfinished(folder):
        return _build(config, folder, inputs, progress or SilentProgress())


def up_to_date_manifest(
    config: CorpusConfig, folder: Path, inputs: list[InputFile] | None = None
) -> Manifest | None:
    """Return the manifest of a whole corpus of this configuration and these files, if there is one.

    Files are compared by path, size and time of change. A data set on the hub has no local files:
    only its configuration counts, so pin its `revision`.
    """
    if not (folder / MANIFEST_FILE).exists() or (folder / BUILDING_FILE).exists():
        return None
    manifest = Manifest.read(folder)
    is_same = manifest.config_hash == config.content_hash()
    is_same = is_same and manifest.inputs == (_input_files(config) if inputs is None else inputs)
    return manifest if is_same and not manifest.check_sizes(folder) else None


def _build(
    config: CorpusConfig, folder: Path, inputs: list[InputFile], progress: Progress
) -> Manifest:
    tally = _Tally()
    writer = ShardWriter(
        folder, train_fraction=config.train_fraction, shard_size_bytes=config.shard_size_bytes
    )
    cleaner = Cleaner(config.clean)
    quality = QualityConfig()
    for source in config.sources:
        for item in source.records():
            match item:
                case Drop():
                    tally.drop(item)
                case SeriesRecord():
                    measurements = measure(
                        item.values, train_fraction=config.train_fraction, config=quality
                    )
                    reason = cleaner.reason_to_drop(item, measurements)
                    if reason is not None:
                        tally.drop(Drop(item_id=item.item_id, source=item.source, reason=reason))
                        continue
                    writer.add(item)
                    tally.keep(item, source)
                    progress.advance(item.source, len(item.values))
    shards = writer.close()
    if not shards:
        raise DataError(f"no series is left to write to {folder}: {tally.describe_drops()}")
    manifest = Manifest(
        fingerprint=corpus_fingerprint(shards, config.train_fraction),
        train_fraction=config.train_fraction,
        shards=shards,
        sources=dict(sorted(tally.sources.items())),
        drops=dict(sorted(tally.drops.items())),
        config=config.as_json(),
        config_hash=config.content_hash(),
        inputs=inputs,
    )
    manifest.write(folder)
    return manifest


class _Tally:
    """Counts what is kept and what is dropped."""

    def __init__(self) -> None:
        self.sources: dict[str, SourceEntry] = {}
        self.drops: dict[str, ReasonDrops] = {}

    def keep(self, record: SeriesRecord, config: SourceConfig) -> None:
        entry = self.sources.setdefault(record.source, SourceEntry())
        entry.series += 1
        entry.points += len(record.values)
        if record.domain not in entry.domains:
            entry.domains.append(record.domain)
        if record.freq is not None and record.freq not in entry.freqs:
            entry.freqs.append(record.freq)
        licences = entry.licence.split("; ") if entry.licence else []
        if config.licence and config.licence not in licences:
            entry.licence = "; ".join([*licences, config.licence])

    def drop(self, drop: Drop) -> None:
        reason = self.drops.setdefault(drop.reason, ReasonDrops())
        of_source = reason.sources.setdefault(drop.source, SourceDrops())
        reason.count += 1
        of_source.count += 1
        if len(of_source.examples) < MAX_EXAMPLES:
            of_source.examples.append(drop.item_id)

    def describe_drops(self) -> str:
        if not self.drops:
            return "the sources are empty"
        reasons = [f"{name} {drops.count}" for name, drops in sorted(self.drops.items())]
        return f"all were dropped ({', '.join(reasons)}); check `clean` and the sources"


def _input_files(config: CorpusConfig) -> list[InputFile]:
    files = []
    for index, source in enumerate(config.sources):
        try:
            found = source.files()
        except ConfigError as error:
            raise ConfigError(f"sources.{index}.{error}") from error
        for file in found:
            status = file.stat()
            files.append(
                InputFile(path=str(file), bytes=status.st_size, mtime_ns=status.st_mtime_ns)
            )
    return files


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    """Refuse to touch what is not an unfinished corpus, or a finished one that may go."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; choose a folder")
    if (folder / BUILDING_FILE).exists() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST_FILE).exists():
        raise ConfigError(
            f"--out {folder} holds files that are no corpus; choose another --out or empty it"
        )
    if not overwrite:
        raise ConfigError(
            f"--out {folder} holds a corpus built from another configuration, from files that have "
            f"changed since, or with damaged shards; choose another --out or pass --overwrite"
        )


@contextmanager
def _unfinished(folder: Path) -> Iterator[None]:
    """Mark the folder as being built; whatever goes wrong, leave nothing that looks whole."""
    marker = folder / BUILDING_FILE
    with marker.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"--out {folder}: another build is writing there; wait for it, or choose another "
                f"--out"
            ) from error
        os.fsync(lock.fileno())
        _remove_corpus_files(folder)
        try:
            yield
        except BaseException:
            _remove_corpus_files(folder)
            marker.unlink(missing_ok=True)
            raise
        marker.unlink()


def _remove_corpus_files(folder: Path) -> None:
    """Remove manifest and shards, the manifest first: without it nothing looks whole."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    for pattern in (SHARD_PATTERN, SHARD_PATTERN + PARTIAL_SUFFIX, MANIFEST_FILE + PARTIAL_SUFFIX):
        for file in folder.glob(pattern):
            file.unlink()
