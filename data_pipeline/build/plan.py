"""What a build consists of: blocks of units, a pure function of the configuration and the files.

Blocks do not depend on how many tasks or processes there are, so a corpus is the same to the byte
whether one process built it or a thousand; and what was done stays done when a build starts again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from data_pipeline.config import CorpusConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.manifest import InputFile
from data_pipeline.sources.unit import Unit


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A unit, and the source that reads it."""

    source: int
    """Position in `sources` of the configuration."""
    unit: Unit


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive units that are read, cleaned and written together: about one shard."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        """What its files begin with, and what random numbers drawn in it depend on."""
        return f"{self.index:05d}"


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """All blocks of a corpus."""

    config_hash: str
    inputs: list[InputFile]
    """Local files that will be read, as they were when the plan was made."""
    blocks: list[Block]

    @property
    def identity(self) -> str:
        """Hash of everything: work done under another plan is never taken for this one's."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def of_task(self, task: int, num_tasks: int) -> list[Block]:
        """Return every `num_tasks`-th block; tasks count from 1."""
        return self.blocks[task - 1 :: num_tasks]

    def to_json(self) -> bytes:
        """Return the plan as JSON, the same bytes for the same plan."""
        return _ADAPTER.dump_json(self, indent=1)

    @classmethod
    def from_json(cls, content: bytes, where: str) -> "BuildPlan":
        """Read a plan.

        Raises:
            DataError: if it is damaged.
        """
        try:
            return _ADAPTER.validate_json(content)
        except ValidationError as error:
            raise DataError(
                f"{where}: the plan of this build is damaged; start again with --overwrite"
            ) from error


_ADAPTER = TypeAdapter(BuildPlan)


def make_plan(config: CorpusConfig) -> BuildPlan:
    """List the units of all sources and group them into blocks.

    Raises:
        ConfigError: if a source names no files.
        DataError: if a file cannot be opened.
    """
    pieces = []
    for index, source in enumerate(config.sources):
        with named_source(index):
            pieces += [Piece(source=index, unit=unit) for unit in source.units()]
    return BuildPlan(
        config_hash=config.content_hash(),
        inputs=input_files(config),
        blocks=_group(pieces, config.shard_size_bytes),
    )


def input_files(config: CorpusConfig) -> list[InputFile]:
    """List the local files that the sources read, with size and time of change."""
    files = []
    for index, source in enumerate(config.sources):
        with named_source(index):
            found = source.files()
        for file in found:
            status = file.stat()
            files.append(
                InputFile(path=str(file), bytes=status.st_size, mtime_ns=status.st_mtime_ns)
            )
    return files


class named_source:  # noqa: N801  (a context manager, used as a function)
    """Say in a configuration error which source it is about."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, ConfigError):
            raise ConfigError(f"sources.{self.index}.{error}") from error


def describe_change(old: Sequence[InputFile], new: Sequence[InputFile]) -> str:
    """Name the first file that was added, removed or changed; "the settings" if none was."""
    before = {file.path: file for file in old}
    after = {file.path: file for file in new}
    for path in sorted(before.keys() | after.keys()):
        if path not in after:
            return f"{path} is gone"
        if path not in before:
            return f"{path} is new"
        if before[path] != after[path]:
            return f"{path} has changed"
    return "the settings differ"


def parse_task(text: str) -> tuple[int, int]:
    """Read "3/8" as the third of eight tasks.

    Raises:
        ConfigError: if it is not of that form, or out of range.
    """
    number, separator, total = text.partition("/")
    if separator and number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total):
        return int(number), int(total)
    raise ConfigError(
        f"--task {text!r}: expected I/N with I from 1 to N, such as 3/8; in a SLURM array "
        f"of 1-8 that is --task $SLURM_ARRAY_TASK_ID/8"
    )


def _group(pieces: list[Piece], block_bytes: int) -> list[Block]:
    """Fill blocks up to `block_bytes`; a unit that is larger, or of unknown size, is alone."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.unit.size_bytes or block_bytes
        if not groups or size > room:
            groups.append([])
            room = block_bytes
        groups[-1].append(piece)
        room -= size
    return [Block(index=index, pieces=tuple(group)) for index, group in enumerate(groups)]
