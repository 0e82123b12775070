"""Cutting what one file holds into units of about equal size.

The cut is a pure function of the file, so that `read` finds a unit again from its number alone.
"""

from dataclasses import dataclass

from data_pipeline.sources.unit import Unit

UNIT_BYTES = 64 * 2**20
"""About how large a unit is: below a shard, so that many tasks can share a file; above what
opening a file again costs."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Things that lie one after another, in blocks of about `UNIT_BYTES`."""

    count: int
    """How many things: variates, rows, bytes of text."""
    size_bytes: int
    """How many bytes all of them take where they are read."""

    @property
    def number(self) -> int:
        """How many blocks there are; at least one, even if it is empty."""
        return max(1, min(self.count, -(-self.size_bytes // UNIT_BYTES)))

    def bounds(self, part: int) -> tuple[int, int]:
        """Return the first thing of a block, and the first behind it."""
        return self.count * part // self.number, self.count * (part + 1) // self.number

    def units(self, file: str, *, value_bytes: int) -> tuple[Unit, ...]:
        """List the blocks.

        Args:
            file: what they are read from.
            value_bytes: about how many bytes of float32 values all blocks yield.
        """
        number = self.number
        return tuple(
            Unit(file=file, part=part, size_bytes=value_bytes // number) for part in range(number)
        )
