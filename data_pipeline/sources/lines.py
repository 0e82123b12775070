"""Text files with one series per line, cut into units at the ends of lines.

A line is known by the byte at which it starts, so that a unit need not read those before it; only
an error message counts lines. Files packed by gzip cannot be cut: their bytes are counted unpacked.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.errors import DataError
from data_pipeline.sources.blocks import Blocks
from data_pipeline.sources.names import one_line
from data_pipeline.sources.unit import Unit

_GZIP = b"\x1f\x8b"
_CHUNK_BYTES = 2**20
_LONGEST_LINE = 2**30
"""One series of about 100 million values."""


@dataclass(frozen=True)
class LineFile:
    """A file of lines, from some byte on."""

    file: Path
    start: int = 0
    """Byte of the first line; what stands before it is a header."""

    def units(self) -> tuple[Unit, ...]:
        """List the units.

        Raises:
            DataError: if there is no line, or the file is not text.
        """
        head = self.head(_CHUNK_BYTES)
        if not head.strip():
            raise DataError(f"{self.file}: holds no series; leave it out, or export it again")
        if b"\0" in head:
            raise DataError(f"{self.file}: holds zero bytes, so it is no text; check the path")
        # A number takes about 8 bytes of text.
        return self._blocks.units(str(self.file), value_bytes=self._blocks.size_bytes // 2)

    def lines(self, part: int) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that start in one unit, each with the byte at which it starts.

        Raises:
            DataError: if the file is cut short or cannot be unpacked, or a line never ends.
        """
        first, end = (self.start + bound for bound in self._blocks.bounds(part))
        with self.open() as handle:
            position = first
            if part:
                handle.seek(first - 1)
                position += self._skip_line(handle) - 1
            else:
                handle.seek(first)
            while self._is_packed or position < end:
                line = handle.readline(_LONGEST_LINE + 1)
                if not line and self._is_packed:
                    return
                if not line:
                    raise DataError(
                        f"{self.file}: ends at byte {position}, expected {end}: it was changed "
                        f"while it was read; build again"
                    )
                if len(line) > _LONGEST_LINE:
                    raise DataError(
                        f"{self.where(position)}: is longer than {_LONGEST_LINE} bytes; is this a "
                        f"file with one series per line?"
                    )
                if line.strip():
                    yield position, line
                position += len(line)

    def where(self, position: int) -> str:
        """Name a line for a message, by its number; reads everything before it."""
        number = 1
        with self.open() as handle:
            while position > 0:
                chunk = handle.read(min(position, _CHUNK_BYTES))
                if not chunk:
                    break
                number += chunk.count(b"\n")
                position -= len(chunk)
        return f"{self.file}, line {number}"

    def head(self, count: int) -> bytes:
        """Return the first bytes of the first lines."""
        with self.open() as handle:
            handle.seek(self.start)
            return handle.read(count)

    @cached_property
    def _is_packed(self) -> bool:
        with self.file.open("rb") as handle:
            return handle.read(len(_GZIP)) == _GZIP

    @cached_property
    def _blocks(self) -> Blocks:
        size = max(0, self.file.stat().st_size - self.start)
        return Blocks(count=1 if self._is_packed else size, size_bytes=size)

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file, unpacked; errors while it is read name it."""
        try:
            with (
                cast(BinaryIO, gzip.open(self.file)) if self._is_packed else self.file.open("rb")
            ) as handle:
                yield handle
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self.file}: cannot be read ({one_line(error)}); copy or export it again"
            ) from error

    @staticmethod
    def _skip_line(handle: BinaryIO) -> int:
        """Read to the end of a line in pieces, and return its length."""
        length = 0
        while piece := handle.readline(_CHUNK_BYTES):
            length += len(piece)
            if piece.endswith(b"\n"):
                break
        return length
