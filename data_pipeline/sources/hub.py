"""Data sets of the Hugging Face hub with one series per row, UTSD and LOTSA before all.

Local copies are read by pyarrow itself: `datasets` would first write a copy of its own. It is
imported only for what lies on the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import ConfigDict

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.names import one_line
from data_pipeline.sources.row_files import open_row_file
from data_pipeline.sources.rows import ROWS_AT_ONCE, RowReader
from data_pipeline.sources.saved import SavedSource
from data_pipeline.sources.unit import ReadsUnits, Unit

if TYPE_CHECKING:
    import datasets

_SAVED_DATASET = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
_SUFFIXES = (".arrow", ".parquet")
_COMPUTED = "cache-"
"""Begins the names of files that `datasets` computed from others and keeps beside them."""
_FOLDERS_OF_SPLITS = ("data", "train", "validation", "test")
"""Folders that do not say which data set is in them."""


@dataclass(frozen=True, kw_only=True)
class HubSource(ReadsUnits):
    """UTSD (arXiv 2402.02368), LOTSA or a data set of their layout: one series per row.

    The column `target` holds the values, a list of numbers or one list per variate; covariates
    beside it are left alone. A series that names no data set belongs to that of its folder.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    type: Literal["hub"] = "hub"
    path: str = "thuml/UTSD"
    """Name on the hub; or a folder, relative to the corpus YAML: one written by `datasets`
    with save_to_disk, or one that holds .arrow or .parquet files at any depth, as UTSD and LOTSA
    have a folder for each of their data sets."""
    name: str | None = None
    """Configuration of the data set; UTSD has UTSD-1G, UTSD-2G, UTSD-4G and UTSD-12G."""
    split: str = "train"
    """Split of a data set on the hub, or of one saved with its splits. UTSD has only `train`;
    series are split in time later."""
    revision: str | None = None
    """Commit or tag on the hub; pin it, so that a rebuild reads the same data."""
    streaming: bool = True
    """Read from the hub without keeping a copy; false downloads everything first."""
    cache_dir: str | None = None
    """Folder for downloads from the hub, where `datasets` keeps them if not given."""
    domain: str | None = None
    """Domain of every series, in place of the one in the rows or in the item_id."""
    source: str | None = None
    """Name of the data set, in place of the one in the rows or in the item_id."""
    freq: str | None = None
    """pandas alias of the sampling interval, in place of the one in the rows."""
    licence: str | None = None
    """Licence of the data, copied to the manifest."""

    def anchored(self, folder: Path) -> Self:
        """Return the same source with a local path made absolute; hub names stay."""
        local = folder.resolve() / self.path
        return replace(self, path=str(local)) if local.is_dir() else self

    def files(self) -> tuple[Path, ...]:
        """List the data files of a local copy; none for a data set on the hub."""
        folder = Path(self.path)
        if not folder.is_dir():
            if folder.is_absolute() or self.path.startswith("."):
                raise ConfigError(f"path: there is no folder {self.path}; check the path")
            return ()
        if self._is_saved():
            return self._saved().files()
        files = tuple(
            sorted(
                file
                for file in folder.rglob("*")
                if file.suffix in _SUFFIXES and not file.name.startswith(_COMPUTED)
            )
        )
        if not files:
            raise ConfigError(
                f"path: {self.path} holds no .arrow or .parquet files; check the path"
            )
        if len({file.suffix for file in files}) > 1:
            raise ConfigError(f"path: {self.path} mixes .arrow and .parquet files; keep one kind")
        return files

    def units(self) -> tuple[Unit, ...]:
        """List the shards of a data set on the hub; of a local copy, files or parts of them."""
        files = self.files()
        if not files:
            with self._errors_name():
                count = self._opened(streaming=True).num_shards
            return tuple(Unit(file=self.path, part=part) for part in range(count))
        if self._is_saved():
            return self._saved().units()
        return tuple(unit for file in files for unit in open_row_file(file).units())

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield all series of a shard or of a part of a file.

        Series without `item_id` are called after the data set, the shard or file, and their row.

        Raises:
            DataError: if the data set cannot be reached or read.
        """
        if unit.file == self.path:
            yield from self._read_shard(unit)
        elif self._is_saved():
            yield from self._saved().read(unit)
        else:
            yield from self._read_file(unit)

    def _read_file(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        file = Path(unit.file)
        place = file.relative_to(self.path).with_suffix("")
        folders = [name for name in place.parts[:-1] if name not in _FOLDERS_OF_SPLITS]
        reader = self._reader(
            name="_".join((Path(self.path).name, *place.parts)),
            data_set=folders[0] if folders else self._data_set(),
            where=str(file),
        )
        for reader.first_row, batch in open_row_file(file).batches(unit.part):
            yield from reader.read(batch)

    def _read_shard(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        name = self._data_set()
        reader = self._reader(name=f"{name}_{unit.part}", data_set=name, where=self.path)
        with self._errors_name():
            shard = self._shard(unit.part).with_format("arrow")
            tables = shard.iter(batch_size=ROWS_AT_ONCE)
        while True:
            # Not around `yield`: what happens to a series afterwards is no fault of the data set.
            with self._errors_name():
                table = next(tables, None)
            if table is None:
                return
            for batch in table.to_batches():
                yield from reader.read(batch)

    def _shard(self, part: int) -> "datasets.Dataset | datasets.IterableDataset":
        stream = self._opened(streaming=True)
        if self.streaming:
            return stream.shard(num_shards=stream.num_shards, index=part)
        # What was downloaded has lost its shards, and is cut into as many parts.
        whole = self._opened(streaming=False)
        return whole.shard(num_shards=stream.num_shards, index=part, contiguous=True)

    def _opened(self, *, streaming: bool) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        return datasets.load_dataset(
            self.path,
            self.name,
            split=self.split,
            revision=self.revision,
            streaming=streaming,
            cache_dir=self.cache_dir,
        )

    @contextmanager
    def _errors_name(self) -> Iterator[None]:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError

        # Of the client it speaks through, httpx or httpx2: a connection that is lost while reading
        # comes out as it is.
        http_error: Any = HfHubHTTPError.__mro__[1]  # Any: to mypy it is a plain type
        try:
            yield
        except (OSError, ValueError, http_error, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{self.path}: cannot be read through `datasets` ({one_line(error)}); check name, "
                f"split and network, or copy the data set to a folder and give that as path"
            ) from error

    def _is_saved(self) -> bool:
        folder = Path(self.path)
        return (folder / _SAVED_DATASET).exists() or (folder / _SAVED_SPLITS).exists()

    def _saved(self) -> SavedSource:
        has_splits = (Path(self.path) / _SAVED_SPLITS).exists()
        return SavedSource(
            path=self.path,
            split=self.split if has_splits else None,
            domain=self.domain,
            source=self.source,
            freq=self.freq,
        )

    def _data_set(self) -> str:
        return self.name or Path(self.path).name

    def _reader(self, *, name: str, data_set: str, where: str) -> RowReader:
        return RowReader(
            where=where,
            name=name,
            data_set=data_set,
            domain=self.domain,
            source=self.source,
            freq=self.freq,
        )
