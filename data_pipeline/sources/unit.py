"""The pieces of a source that are read one by one: restarts and tasks go by them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.record import Drop, SeriesRecord


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of a source."""

    file: str
    """What it is read from, as a path or a name; empty where there is no file."""
    part: int = 0
    """Which part of that file: row group, shard, block of rows."""
    size_bytes: int = 0
    """About as many bytes of float32 values as it yields; 0 if unknown."""

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"{self.file}#{self.part}" if self.part else self.file


class ReadsUnits(ABC):
    """What every source shares: all of its records are those of its units, in order."""

    @abstractmethod
    def units(self) -> tuple[Unit, ...]:
        """List the pieces, in an order that depends on the files alone; reads no values.

        Raises:
            ConfigError: if there is none.
            DataError: if a file cannot be opened.
        """

    @abstractmethod
    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield every series of one piece; names do not depend on what else was read.

        Raises:
            DataError: if the piece cannot be read.
        """

    def records(self) -> Iterator[SeriesRecord | Drop]:
        """Yield every series of every piece."""
        for unit in self.units():
            yield from self.read(unit)
