"""NumPy files with a table of time x variate each, as the npy release of UTSD has them.

Files are read in pieces and not memory-mapped: touched pages of a map would count as memory of
the process, up to the size of the file, and a file that shrinks would kill it.
"""

import tokenize
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.blocks import Blocks
from data_pipeline.sources.files import UNKNOWN_DOMAIN, FileSource
from data_pipeline.sources.names import fixed_folder, one_line, utsd_names
from data_pipeline.sources.unit import Unit

_CHUNK_BYTES = 8 * 2**20
_NUMBER_KINDS = "fiub"
# numpy parses the header as a Python literal and lets out what the parser raises.
_HEADER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    OverflowError,
    SyntaxError,
    RecursionError,
    tokenize.TokenError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, kw_only=True)
class NpySource(FileSource):
    """One or many .npy files: an array time x variate, or of one axis for a single variate.

    A series is called after its file, with the folders below the fixed part of `path`:
    "utsd/**/*.npy" names utsd/Energy/wind/3.npy "Energy/wind/3", which also says its domain and
    data set as UTSD's names do. Numbers of every kind become float32.
    """

    type: Literal["npy"] = "npy"

    def units(self) -> tuple[Unit, ...]:
        """Cut each file into blocks of variates.

        Blocks of a file in C order each read the whole file, so cutting costs reads; UTSD's files
        are below one block.
        """
        arrays = [_Array.open(file) for file in self.files()]
        return tuple(
            unit
            for array in arrays
            for unit in array.blocks.units(str(array.file), value_bytes=array.value_bytes)
        )

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield the variates of one block; memory is that of two blocks as float32."""
        array = _Array.open(Path(unit.file))
        first, end = array.blocks.bounds(unit.part)
        below = array.file.relative_to(fixed_folder(self.path)).with_suffix("").parts
        names = utsd_names("_".join(below))
        for variate, values in enumerate(array.variates(first, end), start=first):
            yield SeriesRecord(
                item_id="/".join(below),
                start=None,
                end=None,
                freq=self.freq,
                domain=self.domain or (names[0] if names else UNKNOWN_DOMAIN),
                source=self.source or (names[1] if names else array.file.stem),
                variate=variate,
                values=values,
            )


@dataclass(frozen=True, kw_only=True)
class _Array:
    """Where the numbers of a file are."""

    file: Path
    dtype: np.dtype
    num_steps: int
    num_variates: int
    offset: int
    """Byte at which the numbers start."""
    has_whole_variates: bool
    """A variate is contiguous: Fortran order, or only one variate."""

    @classmethod
    def open(cls, file: Path) -> "_Array":
        """Read the header.

        Raises:
            DataError: if the file is no array of numbers with one or two axes, or is cut short.
        """
        advice = "write one array time x variate per file with numpy.save"
        try:
            # Maps the file and lets go of it: numpy checks the header against the size.
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except _HEADER_ERRORS as error:
            raise DataError(
                f"{file}: cannot be read as .npy ({one_line(error)}); {advice}"
            ) from error
        if not isinstance(array, np.memmap):
            array.close()
            raise DataError(f"{file}: is a .npz archive of several arrays; {advice}")
        shape = " x ".join(str(size) for size in array.shape)
        if array.dtype.kind not in _NUMBER_KINDS:
            raise DataError(f"{file}: holds {array.dtype} and not numbers; {advice}")
        if array.ndim not in (1, 2):
            raise DataError(
                f"{file}: has {array.ndim} axes ({shape}), expected time x variate; {advice}"
            )
        if array.ndim == 2 and array.shape[1] == 0:
            raise DataError(f"{file}: has no variate ({shape}); {advice}")
        surplus = file.stat().st_size - array.offset - array.nbytes
        if surplus:
            raise DataError(
                f"{file}: has {surplus} bytes behind its {shape} values; copy or export it again"
            )
        return cls(
            file=file,
            dtype=array.dtype,
            num_steps=array.shape[0],
            num_variates=array.shape[1] if array.ndim == 2 else 1,
            offset=array.offset,
            has_whole_variates=array.ndim == 1 or array.shape[1] == 1 or array.flags.f_contiguous,
        )

    @property
    def value_bytes(self) -> int:
        """How many bytes the file yields, as float32."""
        return self.num_steps * self.num_variates * 4

    @property
    def blocks(self) -> Blocks:
        """The variates, cut into units."""
        return Blocks(count=self.num_variates, size_bytes=self.value_bytes)

    def variates(self, first: int, end: int) -> np.ndarray:
        """Read some variates as values_CL."""
        values_CL = np.empty((end - first, self.num_steps), np.float32)
        try:
            # What is beyond float32 becomes infinite, and is dropped under that name later.
            with self.file.open("rb") as handle, np.errstate(over="ignore"):
                if self.has_whole_variates:
                    handle.seek(self.offset + first * self.num_steps * self.dtype.itemsize)
                    self._fill_flat(values_CL.reshape(-1), handle)
                else:
                    handle.seek(self.offset)
                    self._fill_columns(values_CL, handle, first)
        except OSError as error:
            raise DataError(f"{self.file}: cannot be read ({one_line(error)})") from error
        return values_CL

    def _fill_flat(self, flat: np.ndarray, handle: BinaryIO) -> None:
        step = max(1, _CHUNK_BYTES // self.dtype.itemsize)
        for start in range(0, len(flat), step):
            part = flat[start : start + step]
            part[:] = self._numbers(handle, len(part))

    def _fill_columns(self, values_CL: np.ndarray, handle: BinaryIO, first: int) -> None:
        row_bytes = self.num_variates * self.dtype.itemsize
        step = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, self.num_steps, step):
            part_CL = values_CL[:, start : start + step]
            rows = self._numbers(handle, part_CL.shape[1] * self.num_variates)
            rows_LC = rows.reshape(-1, self.num_variates)
            part_CL[:] = rows_LC[:, first : first + len(values_CL)].T

    def _numbers(self, handle: BinaryIO, count: int) -> np.ndarray:
        numbers = np.fromfile(handle, self.dtype, count)
        if len(numbers) != count:
            raise DataError(
                f"{self.file}: ends {count - len(numbers)} values early: it was changed while it "
                f"was read; build again"
            )
        return numbers
