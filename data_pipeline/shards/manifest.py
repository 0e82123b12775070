"""The manifest of a corpus: what the shards hold, what was left out, and how to tell it is whole.

It is written last, so a folder without one is not a corpus.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.storage.store import Store

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
BUILDING_FOLDER = "BUILDING"
"""Holds what a build has done so far; not there once it has finished."""
MAX_EXAMPLES = 20
"""Names of dropped series that are kept per reason and source."""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard file."""

    file: str
    rows: int
    points: int
    bytes: int
    sha256: str
    held_out: list[int] = field(default_factory=list)
    """Rows whose series are never trained on."""


@dataclass(frozen=True, kw_only=True)
class IndexEntry:
    """The series index, `series.arrow`."""

    file: str
    bytes: int
    sha256: str


@dataclass(kw_only=True)
class SourceEntry:
    """What one data set contributes."""

    series: int = 0
    points: int = 0
    domains: list[str] = field(default_factory=list)
    freqs: list[str] = field(default_factory=list)
    """pandas aliases; series without one add nothing."""
    licence: str | None = None


@dataclass(kw_only=True)
class SourceDrops:
    """Series of one data set that were left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first few item_ids."""


@dataclass(kw_only=True)
class ReasonDrops:
    """Series that were left out for one reason."""

    count: int = 0
    sources: dict[str, SourceDrops] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file that was read; a change of size or time means that the corpus is out of date."""

    path: str
    bytes: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known about a finished corpus."""

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    """Identity of the data: same shards and split, same fingerprint."""
    train_fraction: float
    shards: list[ShardEntry]
    sources: dict[str, SourceEntry]
    drops: dict[str, ReasonDrops]
    """By reason."""
    config: dict[str, Any]  # Any: the corpus configuration as JSON
    config_hash: str
    inputs: list[InputFile]
    index: IndexEntry | None = None
    """None in a corpus of an older program: its shards tell what the index would."""

    @property
    def num_series(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_points(self) -> int:
        return sum(shard.points for shard in self.shards)

    @property
    def num_dropped(self) -> int:
        return sum(drops.count for drops in self.drops.values())

    @classmethod
    def read(cls, where: str | os.PathLike[str] | Store) -> "Manifest":
        """Read the manifest of a corpus.

        Args:
            where: folder, URL or store of the corpus.

        Raises:
            DataError: if it is missing, damaged, or of another schema version.
        """
        store = Store.at(where)
        if not store.exists(MANIFEST_FILE):
            raise DataError(_why_no_manifest(store))
        path = store.path_of(MANIFEST_FILE)
        content = store.read_bytes(MANIFEST_FILE)
        try:
            version = json.loads(content)["schema_version"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path}: is no manifest of a corpus; build the corpus again"
            ) from error
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path}: schema version {version}, but this program reads {SCHEMA_VERSION}; build "
                f"the corpus again with this program, or install the one that wrote it"
            )
        try:
            return _ADAPTER.validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(
                f"{path}: {key}: {first['msg']}; build the corpus again or copy the manifest again"
            ) from error

    def write(self, where: str | os.PathLike[str] | Store) -> None:
        """Write the manifest, whole or not at all."""
        Store.at(where).write_bytes(MANIFEST_FILE, self.to_json(indent=1))

    def to_json(self, *, indent: int | None = None) -> bytes:
        """Return the manifest as JSON."""
        return _ADAPTER.dump_json(self, indent=indent)

    def check_sizes(self, where: str | os.PathLike[str] | Store) -> list[str]:
        """Name the shards that are missing or not as long as they should be."""
        return list(self.find_wrong_sizes(where).values())

    def find_wrong_sizes(self, where: str | os.PathLike[str] | Store) -> dict[str, str]:
        """Say what is wrong with each file that is missing or not as long as it should be."""
        store = Store.at(where)
        expected = {shard.file: shard.bytes for shard in self.shards}
        if self.index is not None:
            expected[self.index.file] = self.index.bytes
        # One listing of a remote store costs less than a question for each of its files.
        listed = None if store.is_local else store.files()
        problems: dict[str, str] = {}
        for name, size in expected.items():
            found = store.size(name) if listed is None else listed.get(name)
            what = "shard" if self.index is None or name != self.index.file else "series index"
            if found is None:
                problems[name] = (
                    f"{store.path_of(name)}: the {what} is missing; rebuild or copy again"
                )
            elif found != size:
                problems[name] = (
                    f"{store.path_of(name)}: the {what} is damaged, expected {size} bytes but "
                    f"found {found}; rebuild or copy again"
                )
        return problems


_ADAPTER = TypeAdapter(Manifest)


def corpus_fingerprint(shards: Sequence[ShardEntry], train_fraction: float) -> str:
    """Hash what decides which points a run may see: schema version, split and shards, in order."""
    identity: list[object] = [SCHEMA_VERSION, train_fraction, [shard.sha256 for shard in shards]]
    held_out = [shard.held_out for shard in shards]
    if any(held_out):  # else the same as before series could be held out
        identity.append(held_out)
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _why_no_manifest(store: Store) -> str:
    if store.is_local and not store.local_path("").exists():
        return f"{store}: no such folder; build a corpus with `tsmoe data build`"
    if store.files(BUILDING_FOLDER):
        return f"{store}: the build has not finished; run the same `tsmoe data build` again"
    return f"{store}: is no corpus, it has no {MANIFEST_FILE}; build one with `tsmoe data build`"
