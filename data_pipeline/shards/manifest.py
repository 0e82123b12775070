"""The manifest of a corpus: what the shards hold, what was left out, and how to tell it is whole.

It is written last, so a folder without one is not a corpus.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import DataError
from data_pipeline.shards.durable import durable_file

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
BUILDING_FILE = "BUILDING"
"""Marks a folder whose build has not finished; holds nothing."""
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
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a corpus folder.

        Raises:
            DataError: if it is missing, damaged, or of another schema version.
        """
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise DataError(_why_no_manifest(folder))
        content = path.read_bytes()
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

    def write(self, folder: Path) -> None:
        """Write the manifest, whole or not at all."""
        content = self.to_json(indent=1)
        with durable_file(folder / MANIFEST_FILE, len(content)) as partial:
            partial.write_bytes(content)

    def to_json(self, *, indent: int | None = None) -> bytes:
        """Return the manifest as JSON."""
        return _ADAPTER.dump_json(self, indent=indent)

    def check_sizes(self, folder: Path) -> list[str]:
        """Name the shards that are missing or not as long as they should be."""
        problems = []
        for shard in self.shards:
            path = folder / shard.file
            if not path.is_file():
                problems.append(f"{path}: the shard is missing; rebuild or copy again")
            elif (found := path.stat().st_size) != shard.bytes:
                problems.append(
                    f"{path}: the shard is damaged, expected {shard.bytes} bytes but found {found};"
                    f" rebuild or copy again"
                )
        return problems


_ADAPTER = TypeAdapter(Manifest)


def corpus_fingerprint(shard_hashes: Sequence[str], train_fraction: float) -> str:
    """Hash what decides which points a run may see: schema version, split and shards, in order."""
    identity = [SCHEMA_VERSION, train_fraction, list(shard_hashes)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _why_no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; build a corpus with `tsmoe data build`"
    if (folder / BUILDING_FILE).exists():
        return f"{folder}: the build has not finished; run the same `tsmoe data build` again"
    return f"{folder}: is no corpus, it has no {MANIFEST_FILE}; build one with `tsmoe data build`"
