"""Building one block: read its units, resample, measure, clean, mix, and write what stays.

A block leaves its files in the folder BUILDING of the corpus, and last of all `NNNNN.json`, which
vouches for them: a block without it has not been built.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_pipeline.build.plan import Block
from data_pipeline.build.tally import Tally
from data_pipeline.config import CorpusConfig
from data_pipeline.curation.table import SeriesTable
from data_pipeline.progress import Progress
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.shards.manifest import BUILDING_FOLDER, ReasonDrops, ShardEntry, SourceEntry
from data_pipeline.shards.writer import ShardWriter, file_sha256
from data_pipeline.similarity.sketch import SketchWriter
from data_pipeline.steps.clean import reason_to_drop
from data_pipeline.steps.mixup import SeriesMixer
from data_pipeline.steps.quality import measure
from data_pipeline.steps.resample import resample
from data_pipeline.steps.split import is_held_out
from data_pipeline.storage import Store

TABLE_FILE = "series.parquet"
SKETCH_FILE = "sketches.npy"


@dataclass(frozen=True, kw_only=True)
class BlockFile:
    """A file of a block beside its shards."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class BlockResult:
    """What a finished block holds."""

    plan: str
    """Identity of the plan it was built under."""
    index: int
    shards: list[ShardEntry]
    """Before duplicates are taken out."""
    files: dict[str, BlockFile]
    """The table of series and the sketches, by name."""
    sources: dict[str, SourceEntry]
    drops: dict[str, ReasonDrops]

    def expected(self, name: str) -> BlockFile:
        """Size and hash of one of its files."""
        shards = {s.file: BlockFile(bytes=s.bytes, sha256=s.sha256) for s in self.shards}
        return (shards | self.files)[name]

    def path(self, name: str) -> str:
        """Where a file of the block lies in the store."""
        return f"{BUILDING_FOLDER}/{self.index:05d}/{name}"


_ADAPTER = TypeAdapter(BlockResult)


def read_result(store: Store, block: Block, plan: str) -> BlockResult | None:
    """Return the result of a block if it was built under this plan and its files are whole."""
    name = _result_name(block)
    if not store.exists(name):
        return None
    try:
        result = _ADAPTER.validate_json(store.read_bytes(name))
    except ValidationError:
        return None
    sizes = {shard.file: shard.bytes for shard in result.shards}
    sizes |= {name: file.bytes for name, file in result.files.items()}
    is_whole = result.plan == plan and all(
        store.size(result.path(name)) == size for name, size in sizes.items()
    )
    return result if is_whole else None


def build_block(
    config: CorpusConfig, block: Block, *, plan: str, store: Store, progress: Progress
) -> BlockResult:
    """Build a block and hand its files to the store.

    Raises:
        DataError: if a unit cannot be read, or the store takes no more.
    """
    with scratch_folder(store, block.name) as scratch:
        shards, tally = _write(config, block, scratch, progress)
        result = BlockResult(
            plan=plan,
            index=block.index,
            shards=shards,
            files={name: _describe(scratch / name) for name in (TABLE_FILE, SKETCH_FILE)},
            sources=tally.sources,
            drops=tally.drops,
        )
        for name in [*(shard.file for shard in shards), *result.files]:
            store.put_file(result.path(name), scratch / name)
    store.write_bytes(_result_name(block), _ADAPTER.dump_json(result))
    return result


@contextmanager
def scratch_folder(store: Store, name: str) -> Iterator[Path]:
    """Give a folder of this process for files on their way to the store; it goes in the end.

    In a local store it lies beside the others, so that files are linked and not copied.
    """
    if store.is_local:
        folder = store.local_path(f"{BUILDING_FOLDER}/{name}.scratch")
        shutil.rmtree(folder, ignore_errors=True)  # what a killed build left there
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="tsmoe-build-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(
    config: CorpusConfig, block: Block, scratch: Path, progress: Progress
) -> tuple[list[ShardEntry], Tally]:
    """Write the shards, the table and the sketches of a block."""
    tally = Tally()
    writer = ShardWriter(
        scratch, train_fraction=config.train_fraction, shard_size_bytes=config.shard_size_bytes
    )
    sketches = SketchWriter(anchors=config.duplicates.similar)
    with SeriesTable(scratch / TABLE_FILE) as table:
        for record, licence in _series_that_stay(config, block, table, tally):
            writer.add(record, is_held_out=_is_held_out(config, record))
            sketches.add(record.values)
            tally.keep(record, licence)
            progress.advance(record.source, len(record.values))
    sketches.write(scratch / SKETCH_FILE)
    return writer.close(), tally


def _series_that_stay(
    config: CorpusConfig, block: Block, table: SeriesTable, tally: Tally
) -> Iterator[tuple[SeriesRecord, str | None]]:
    """Yield the series that pass, with their licence, and enter all others as dropped."""
    mixer = None
    if config.mixup is not None:
        mixer = SeriesMixer(config.mixup, config.train_fraction, block.name)

    def judge(record: SeriesRecord) -> bool:
        measurements = measure(
            record.values, train_fraction=config.train_fraction, config=config.quality
        )
        reason = reason_to_drop(measurements, config.clean)
        table.add(record, measurements, reason)
        if reason is not None:
            tally.drop(Drop(item_id=record.item_id, source=record.source, reason=reason))
        return reason is None

    def drop(item: Drop) -> None:
        table.add_drop(item)
        tally.drop(item)

    for piece in block.pieces:
        source = config.sources[piece.source]
        for item in source.read(piece.unit):
            if isinstance(item, SeriesRecord) and config.resample is not None:
                item = resample(item, config.resample)
            if isinstance(item, Drop):
                drop(item)
            elif judge(item):
                yield item, source.licence
                # Mixtures are trained on, so nothing of a series that is held out may be in one.
                if mixer is not None and not _is_held_out(config, item):
                    mixer.add(item)
    for record in mixer.mixed() if mixer is not None else ():
        if judge(record):
            yield record, None


def _is_held_out(config: CorpusConfig, record: SeriesRecord) -> bool:
    return is_held_out(record.source, record.item_id, config.held_out_fraction)


def _describe(path: Path) -> BlockFile:
    return BlockFile(bytes=path.stat().st_size, sha256=file_sha256(path))


def _result_name(block: Block) -> str:
    return f"{BUILDING_FOLDER}/{block.name}.json"
