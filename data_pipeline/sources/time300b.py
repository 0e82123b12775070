"""Time-300B, the corpus of Time-MoE (arXiv 2409.16040), in its binary layout.

A tree of folders; a leaf holds `meta.json` and `data-{i}-of-{N}.bin`. The files of a leaf are one
array that was cut anywhere, so a sequence may begin in one and end in the next. Values are stored
standardised where `meta.json` gives a mean and std, which are then put back.
"""

import glob
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource, check_file_names
from data_pipeline.sources.names import fixed_folder
from data_pipeline.sources.time300b_meta import META_FILE, LeafHead, Sequences, read_sequences
from data_pipeline.sources.unit import Unit

_CHUNK_VALUES = 2**20


@dataclass(frozen=True, kw_only=True)
class Time300bSource(FileSource):
    """Time-300B, or any part of it.

    The first folder below `path` is the domain, with its first letter raised, so that "nature"
    joins UTSD's Nature; those below it name the data set. A sequence is called after its folder
    and number. There are no times: the authors left them out.
    """

    type: Literal["time300b"] = "time300b"
    path: str
    """A folder, with leaf folders at any depth, or a pattern such as "Time-300B/nature/*";
    relative to the corpus YAML."""

    def files(self) -> tuple[Path, ...]:
        """List the files of every leaf folder, the folders sorted by name.

        Raises:
            ConfigError: if there is none.
        """
        return tuple(
            file
            for leaf in self._leaves()
            for file in (leaf / META_FILE, *sorted(leaf.glob("*.bin")))
        )

    def units(self) -> tuple[Unit, ...]:
        """Cut each leaf folder into ranges of sequences, of equal number and so about equal size.

        Raises:
            DataError: if files are missing, or do not have the size that `meta.json` states.
        """
        units: list[Unit] = []
        for leaf in self._leaves():
            head = LeafHead.read(leaf)
            units += head.blocks.units(str(leaf), value_bytes=head.num_values * 4)
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield one range of sequences.

        Memory is that of one sequence, and of 32 bytes for each sequence of the folder.
        """
        leaf = Path(unit.file)
        head = LeafHead.read(leaf)
        meta = leaf / META_FILE
        status = meta.stat()
        sequences = read_sequences(meta, status.st_size, status.st_mtime_ns)
        sequences.check(head)
        root = fixed_folder(self.path) if glob.has_magic(self.path) else Path(self.path)
        below = leaf.relative_to(root).parts or (leaf.name,)
        is_nested = len(below) > 1
        first, end = head.blocks.bounds(unit.part)
        for number in range(first, end):
            yield SeriesRecord(
                item_id=f"{'/'.join(below)}/{number}",
                start=None,
                end=None,
                freq=self.freq,
                domain=self.domain or (_domain(below[0]) if is_nested else UNKNOWN_DOMAIN),
                source=self.source or "_".join(below[1:] if is_nested else below),
                variate=0,
                values=_values(head, sequences, number),
            )

    def _leaves(self) -> list[Path]:
        roots = [Path(match) for match in sorted(glob.glob(self.path, recursive=True))]
        leaves = {meta.parent for root in roots if root.is_dir() for meta in root.rglob(META_FILE)}
        if not leaves:
            raise ConfigError(
                f"path: no folder with {META_FILE} at {self.path!r} or below it; check the path of "
                f"the source"
            )
        check_file_names(leaves)
        return sorted(leaves)


def _values(head: LeafHead, sequences: Sequences, number: int) -> np.ndarray:
    """Read one sequence from the files it lies in."""
    start = int(sequences.offsets[number])
    values = np.empty(int(sequences.lengths[number]), np.float32)
    done = 0
    while done < len(values):
        index = bisect_right(head.ends, start + done)
        begin = head.ends[index - 1] if index else 0
        inside = values[done : done + head.ends[index] - start - done]
        stored = _Stored(
            file=head.files[index],
            dtype=head.dtype,
            first=start + done - begin,
            mean=float(sequences.means[number]),
            std=float(sequences.stds[number]),
        )
        stored.restore(inside)
        done += len(inside)
    return values


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """Values that lie one after another in one file."""

    file: Path
    dtype: np.dtype
    first: int
    """Position of the first of them in the file."""
    mean: float
    std: float

    def restore(self, values: np.ndarray) -> None:
        """Fill float32 `values` with the next stored ones times std plus mean."""
        try:
            # What is beyond float32 becomes infinite, and is dropped under that name later.
            with self.file.open("rb") as handle, np.errstate(over="ignore", invalid="ignore"):
                handle.seek(self.first * self.dtype.itemsize)
                for start in range(0, len(values), _CHUNK_VALUES):
                    part = values[start : start + _CHUNK_VALUES]
                    stored = np.fromfile(handle, self.dtype, len(part))
                    self._check(len(stored), len(part))
                    # Departure: in float64, where Time-MoE rounds to the stored type in between.
                    part[:] = stored.astype(np.float64) * self.std + self.mean
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({error.strerror})") from error

    def _check(self, got: int, expected: int) -> None:
        if got != expected:
            raise DataError(
                f"{self.file}: ends {expected - got} values early: it was changed while it was "
                f"read; build again"
            )


def _domain(folder: str) -> str:
    return folder[:1].upper() + folder[1:]
