"""`meta.json` of Time-300B: which files a folder has, and where each sequence lies in them.

The list of sequences can be far larger than memory as Python objects, so it is decoded one by one
into arrays.
"""

import math
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.sources.blocks import Blocks
from data_pipeline.sources.json_stream import JsonStream
from data_pipeline.sources.names import one_line

META_FILE = "meta.json"
_DATA_FILE = re.compile(r"data-(\d+)-of-(\d+)\.bin")
_HEAD_KEYS = ("num_sequences", "dtype", "files")
_SCALES = "scales"
_NUMBER_KINDS = "fiu"


@dataclass(frozen=True, kw_only=True)
class LeafHead:
    """What `meta.json` says of a leaf folder as a whole."""

    folder: Path
    dtype: np.dtype
    num_sequences: int
    files: tuple[Path, ...]
    ends: tuple[int, ...]
    """Number of values in a file and all before it."""

    @classmethod
    def read(cls, folder: Path) -> "LeafHead":
        """Read the few keys that describe the folder, and compare the sizes of its files.

        Raises:
            DataError: if a key is missing or makes no sense, or a file is missing or cut short.
        """
        meta = folder / META_FILE
        content = _read_head(meta)
        dtype = _dtype(content["dtype"], meta)
        counts = content["files"]
        if not (isinstance(counts, dict) and counts and all(map(_is_count, counts.values()))):
            raise DataError(f"{meta}: `files` must give the number of values of each file")
        if not _is_count(content["num_sequences"]):
            raise DataError(f"{meta}: num_sequences is {content['num_sequences']!r:.80}, no count")
        names = _in_order(list(counts), meta)
        files = tuple(folder / name for name in names)
        for file in files:
            _check_size(file, counts[file.name], dtype)
        ends = np.cumsum([counts[name] for name in names], dtype=np.int64).tolist()
        return cls(
            folder=folder,
            dtype=dtype,
            num_sequences=content["num_sequences"],
            files=files,
            ends=tuple(ends),
        )

    @property
    def num_values(self) -> int:
        """How many values all files hold."""
        return self.ends[-1]

    @property
    def blocks(self) -> Blocks:
        """The sequences, cut into units."""
        return Blocks(count=self.num_sequences, size_bytes=self.num_values * 4)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Where each sequence of a leaf folder lies, and what standardised it."""

    meta: Path
    offsets: np.ndarray
    lengths: np.ndarray
    means: np.ndarray
    """0 where none is stored, and 1 for the std."""
    stds: np.ndarray

    def check(self, head: LeafHead) -> None:
        """Check that the sequences are as many as stated, and lie within the files."""
        if len(self.offsets) != head.num_sequences:
            raise DataError(
                f"{self.meta}: num_sequences is {head.num_sequences}, but `scales` lists "
                f"{len(self.offsets)}; download the file again"
            )
        bad = (self.offsets < 0) | (self.lengths < 0)
        bad |= self.offsets > head.num_values - self.lengths
        if bad.any():
            number = int(np.argmax(bad))
            raise DataError(
                f"{self.meta}, sequence {number}: offset {self.offsets[number]} and length "
                f"{self.lengths[number]} lie outside of the {head.num_values} values of the files"
            )


@lru_cache(maxsize=1)
def read_sequences(meta: Path, size: int, mtime_ns: int) -> Sequences:  # noqa: ARG001
    """Read `scales`; the last one read is kept, as the units of a folder follow each other.

    Args:
        meta: the file.
        size: of the file, and
        mtime_ns: its time of change, so that one that changed is read again.

    Raises:
        DataError: naming the first sequence that is not described well.
    """
    offsets, lengths, means, stds = array("q"), array("q"), array("d"), array("d")
    for number, scale in enumerate(_read_scales(meta)):
        try:
            offsets.append(scale["offset"])
            lengths.append(scale["length"])
            scaled = "mean" in scale or "std" in scale
            mean, std = (scale["mean"], scale["std"]) if scaled else (0.0, 1.0)
            means.append(mean)
            stds.append(std)
        except (KeyError, TypeError, OverflowError) as error:
            raise DataError(
                f"{meta}, sequence {number}: expected offset and length, and mean and std both or "
                f"neither, got {scale!r:.200}"
            ) from error
        if not (math.isfinite(mean) and math.isfinite(std)):
            raise DataError(
                f"{meta}, sequence {number}: mean {mean} and std {std} must be finite; its values "
                f"cannot be restored"
            )
    return Sequences(
        meta=meta,
        offsets=np.frombuffer(offsets, np.int64),
        lengths=np.frombuffer(lengths, np.int64),
        means=np.frombuffer(means, np.float64),
        stds=np.frombuffer(stds, np.float64),
    )


def _read_head(meta: Path) -> dict[str, Any]:  # Any: JSON
    """Read all keys but the long list of sequences, and stop as soon as they are there."""
    head: dict[str, Any] = {}
    with _document(meta) as stream:
        for key in stream.members():
            if key != _SCALES:
                head[key] = stream.value()
            if head.keys() >= set(_HEAD_KEYS):
                return head
            if key == _SCALES:
                for _ in stream.elements():
                    pass
    missing = [key for key in _HEAD_KEYS if key not in head]
    raise DataError(f"{meta}: lacks {', '.join(missing)}; expected the meta.json of Time-300B")


def _read_scales(meta: Path) -> Iterator[Any]:  # Any: JSON
    with _document(meta) as stream:
        for key in stream.members():
            if key == _SCALES:
                yield from stream.elements()
            else:
                stream.value()
        stream.end()


@contextmanager
def _document(meta: Path) -> Iterator[JsonStream]:
    try:
        with meta.open(encoding="utf-8") as handle:
            yield JsonStream(handle)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{meta}: cannot be read as JSON ({one_line(error)}); download the file again"
        ) from error


def _dtype(name: object, meta: Path) -> np.dtype:
    try:
        dtype = np.dtype(name) if isinstance(name, str) else None
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in _NUMBER_KINDS:
        raise DataError(f"{meta}: dtype is {name!r:.80}, expected a numpy type such as 'float32'")
    return dtype.newbyteorder("<")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _in_order(names: list[str], meta: Path) -> list[str]:
    """Sort the files by their number, which must run from 1 to N.

    Departure: Time-MoE's reader sorts names as text, which puts file 10 before file 2 and reads
    other values than were written; its writer numbers the files in the order of the values.
    """
    matches = {name: _DATA_FILE.fullmatch(name) for name in names}
    numbers = {name: (int(match[1]), int(match[2])) for name, match in matches.items() if match}
    ordered = sorted(names, key=lambda name: numbers.get(name, (0, 0)))
    expected = [(number + 1, len(names)) for number in range(len(names))]
    if [numbers.get(name) for name in ordered] != expected:
        raise DataError(
            f"{meta}: `files` must be data-1-of-{len(names)}.bin to "
            f"data-{len(names)}-of-{len(names)}.bin, got {', '.join(ordered):.200}"
        )
    return ordered


def _check_size(file: Path, count: int, dtype: np.dtype) -> None:
    expected = count * dtype.itemsize
    try:
        size = file.stat().st_size
    except OSError as error:
        raise DataError(f"{file}: is missing ({error.strerror}); download it again") from error
    if size != expected:
        raise DataError(
            f"{file}: has {size} bytes, but {META_FILE} states {count} values of {dtype.name}, "
            f"which are {expected}; download it again"
        )
