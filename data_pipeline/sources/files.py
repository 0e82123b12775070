"""What all sources of local files share: where the files are, and what the user overrides."""

import glob
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from pydantic import ConfigDict

from data_pipeline.errors import ConfigError
from data_pipeline.sources.unit import ReadsUnits, Unit

UNKNOWN_DOMAIN = "unspecified"
"""Domain of a series where neither the data nor the configuration names one."""


def check_file_names(files: Iterable[Path]) -> None:
    """Refuse files that no series or manifest can be called after.

    Raises:
        ConfigError: naming the first whose name is no UTF-8.
    """
    for file in files:
        try:
            str(file).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"path: the name of the file {str(file)!a} is no UTF-8; rename it"
            ) from error


@dataclass(frozen=True, kw_only=True)
class FileSource(ReadsUnits):
    """Files on disk, and names that override what stands in them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    path: str
    """A file, or a pattern such as "weather/*.parquet"; relative to the corpus YAML."""
    domain: str | None = None
    """Domain of every series here, in place of the one in the data."""
    source: str | None = None
    """Name of the data set, in place of the one in the data or the name of the file."""
    freq: str | None = None
    """pandas alias of the sampling interval, in place of the one in the data."""
    licence: str | None = None
    """Licence of the data, copied to the manifest."""

    def anchored(self, folder: Path) -> Self:
        """Return the same source with its path made absolute, as seen from a folder."""
        return replace(self, path=str(folder.resolve() / self.path))

    def files(self) -> tuple[Path, ...]:
        """List the files, sorted by name.

        Raises:
            ConfigError: if there is none, or the name of one is no UTF-8.
        """
        matches = sorted(Path(match) for match in glob.glob(self.path, recursive=True))
        files = tuple(match for match in matches if match.is_file())
        if not files:
            raise ConfigError(f"path: no file matches {self.path!r}; check the path of the source")
        check_file_names(files)
        return files

    def units(self) -> tuple[Unit, ...]:
        """One unit per file, unless a source knows its files' parts."""
        return tuple(Unit(file=str(file), size_bytes=file.stat().st_size) for file in self.files())
