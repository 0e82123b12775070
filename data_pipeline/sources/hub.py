"""Data sets of the Hugging Face hub with one series per row, UTSD before all, or local copies.

`datasets` is imported only when rows are read: it takes a second.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import ConfigDict

from data_pipeline.errors import ConfigError, DataError, TsmoeError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.rows import RowReader
from data_pipeline.sources.unit import ReadsUnits, Unit

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 64
_SAVED_DATASET = "state.json"
_SAVED_SPLITS = "dataset_dict.json"
_FORMATS = {".arrow": "arrow", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class HubSource(ReadsUnits):
    """UTSD (arXiv 2402.02368) or a data set of its layout: one series per row, in `target`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    type: Literal["hub"] = "hub"
    path: str = "thuml/UTSD"
    """Name on the hub; or a folder, relative to the corpus YAML: one written by `datasets`
    with save_to_disk, or one that holds .arrow or .parquet files at any depth."""
    name: str | None = None
    """Configuration of the data set; UTSD has UTSD-1G, UTSD-2G, UTSD-4G and UTSD-12G."""
    split: str = "train"
    """Split of the data set. UTSD has only `train`; series are split in time later."""
    revision: str | None = None
    """Commit or tag on the hub; pin it, so that a rebuild reads the same data."""
    streaming: bool = True
    """Read over the network without keeping a copy; false downloads everything first."""
    cache_dir: str | None = None
    """Folder for downloads, where `datasets` keeps them if not given."""
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
        files = tuple(sorted(file for file in folder.rglob("*") if file.suffix in _FORMATS))
        if not files:
            raise ConfigError(
                f"path: {self.path} holds no .arrow or .parquet files; check the path"
            )
        return files

    def units(self) -> tuple[Unit, ...]:
        """Take the whole split as one piece."""
        size = sum(file.stat().st_size for file in self.files())
        return (Unit(file=self.path, size_bytes=size),)

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield all series of the split.

        Raises:
            DataError: if the data set cannot be reached or read.
        """
        reader = RowReader(
            where=self.path,
            name=self.name or Path(self.path).name,
            domain=self.domain,
            source=self.source,
            freq=self.freq,
        )
        import datasets

        try:
            rows = self._open().with_format("arrow")
            for table in rows.iter(batch_size=_ROWS_AT_ONCE):
                for batch in table.to_batches():
                    yield from reader.read(batch)
        except TsmoeError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{self.path}: cannot be read through `datasets` ({reason}); check name, split and "
                f"network, or copy the data set to a folder and give that as path"
            ) from error

    def _open(self) -> "datasets.Dataset | datasets.IterableDataset":
        import datasets

        if not self.files():
            return datasets.load_dataset(
                self.path,
                self.name,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
                cache_dir=self.cache_dir,
            )
        folder = Path(self.path)
        if (folder / _SAVED_DATASET).exists() or (folder / _SAVED_SPLITS).exists():
            return self._open_saved(folder)
        return self._open_loose()

    def _open_saved(self, folder: Path) -> "datasets.Dataset":
        """Open what save_to_disk wrote; it is memory-mapped, so streaming would save nothing."""
        import datasets

        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return saved
        if self.split not in saved:
            raise ConfigError(
                f"split: {folder} has no split {self.split!r}; splits: {', '.join(saved)}"
            )
        return saved[self.split]

    def _open_loose(self) -> "datasets.Dataset | datasets.IterableDataset":
        """Open a folder of data files, all of which belong to one split."""
        import datasets

        files = self.files()
        formats = {_FORMATS[file.suffix] for file in files}
        if len(formats) > 1:
            raise ConfigError(f"path: {self.path} mixes .arrow and .parquet files; keep one kind")
        return datasets.load_dataset(
            formats.pop(),
            data_files=[str(file) for file in files],
            split="train",
            streaming=self.streaming,
            cache_dir=self.cache_dir,
        )
