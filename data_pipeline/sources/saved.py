"""Data sets that `datasets` saved to disk: UTSD as its users keep it, LOTSA as it is published.

A folder written by save_to_disk holds `state.json`, which lists its files in the stream format of
Arrow; a dictionary of splits holds `dataset_dict.json` and one such folder per split. The files
are read by pyarrow itself: opening the whole data set for each unit would cost more than reading.
"""

import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.arrow_stream import check_stream_end
from data_pipeline.sources.blocks import Blocks
from data_pipeline.sources.files import FileSource, check_file_names
from data_pipeline.sources.names import one_line
from data_pipeline.sources.rows import TARGET, RowReader
from data_pipeline.sources.unit import Unit

_STATE = "state.json"
_SPLITS = "dataset_dict.json"
_ITEM_ID = "item_id"
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class SavedSource(FileSource):
    """Folders written by `datasets` with save_to_disk, one series per row in `target`.

    The values of a row are a list of numbers, or one list per variate as in LOTSA. A series
    without `item_id` is called after the folder, the number of its file and its row in there.
    """

    type: Literal["saved"] = "saved"
    path: str
    """A folder, or a pattern such as "lotsa_data/*"; relative to the corpus YAML."""
    split: str | None = None
    """Which split of a dictionary of splits; needed only where there is more than one."""

    def files(self) -> tuple[Path, ...]:
        """List the description and the data files of every folder.

        Raises:
            ConfigError: if there is no such folder, or it was not saved by `datasets`.
        """
        return tuple(
            file for folder in self._folders() for file in (folder / _STATE, *_data_files(folder))
        )

    def units(self) -> tuple[Unit, ...]:
        """Cut each file into ranges of rows."""
        units: list[Unit] = []
        for folder in self._folders():
            for file in _data_files(folder):
                with _table(file) as table:
                    blocks = _blocks(file, table)
                if blocks.count:
                    units += blocks.units(str(file), value_bytes=blocks.size_bytes)
        if not units:
            raise DataError(f"{self.path}: holds no series; leave it out, or save it again")
        return tuple(units)

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Yield one range of rows; values are mapped, so memory is that of 64 series."""
        file = Path(unit.file)
        folder = file.parent
        is_split = (folder.parent / _SPLITS).exists()
        name = folder.parent.name if is_split else folder.name
        reader = RowReader(
            where=str(file), name=name, domain=self.domain, source=self.source, freq=self.freq
        )
        number = _data_files(folder).index(file)
        with _table(file) as table:
            first, end = _blocks(file, table).bounds(unit.part)
            for start in range(first, end, _ROWS_AT_ONCE):
                row = start
                for batch in _batches(table.slice(start, min(_ROWS_AT_ONCE, end - start)), file):
                    yield from reader.read(_named(batch, f"{name}_{number}", row))
                    row += batch.num_rows

    def _folders(self) -> list[Path]:
        matches = [Path(match) for match in sorted(glob.glob(self.path, recursive=True))]
        folders = [self._folder(match) for match in matches if match.is_dir()]
        if not folders:
            raise ConfigError(
                f"path: no folder matches {self.path!r}; check the path of the source"
            )
        check_file_names(folders)
        return folders

    def _folder(self, folder: Path) -> Path:
        """Return the folder itself, or that of the split."""
        if (folder / _STATE).exists():
            if self.split is not None:
                raise ConfigError(
                    f"split: {folder} holds one data set without splits; leave `split` out"
                )
            return folder
        if not (folder / _SPLITS).exists():
            raise ConfigError(
                f"path: {folder} was not written by `datasets` with save_to_disk (it has no "
                f"{_STATE}); for loose .arrow or .parquet files use type: hub"
            )
        splits = _json(folder / _SPLITS).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise DataError(f"{folder / _SPLITS}: lists no splits; save the data set again")
        wanted = splits[0] if self.split is None and len(splits) == 1 else self.split
        if wanted is None or wanted not in splits:
            raise ConfigError(
                f"split: {folder} has the splits {', '.join(splits)}, got {self.split}; name one"
            )
        return folder / wanted


def _data_files(folder: Path) -> list[Path]:
    """List the data files in the order of their rows."""
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: its rows are picked by an index, as old versions of `datasets` saved them; "
            f"load it and save it again"
        )
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        return [folder / Path(name).name for name in names]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{folder / _STATE}: lists no data files; save the data set again"
        ) from error


def _json(file: Path) -> dict[str, Any]:  # Any: JSON
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({one_line(error)})") from error
    return content if isinstance(content, dict) else {}


@contextmanager
def _table(file: Path) -> Iterator[pa.Table]:
    """Map a file; nothing but the heads of its batches is read."""
    with _errors_name(file):
        check_stream_end(file)
        mapped = pa.memory_map(str(file))
        table = pa.ipc.open_stream(mapped).read_all()
        _check_columns(table, file)
    with mapped:
        yield table


@contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: cannot be read as an Arrow stream ({one_line(error)}); copy it again"
        ) from error


def _check_columns(table: pa.Table, file: Path) -> None:
    """Raise DataError if there is no target, and UnicodeDecodeError if a name is no UTF-8."""
    if TARGET not in table.column_names:
        raise DataError(
            f"{file}: no column 'target' with the values of a series; columns: "
            f"{', '.join(table.column_names)}"
        )


def _blocks(file: Path, table: pa.Table) -> Blocks:
    return Blocks(count=table.num_rows, size_bytes=file.stat().st_size)


def _batches(table: pa.Table, file: Path) -> list[pa.RecordBatch]:
    """Check some rows, and strip extension types such as Array2D down to lists."""
    with _errors_name(file):
        table.validate(full=True)
        for index, field in enumerate(table.schema):
            if isinstance(field.type, pa.BaseExtensionType):
                column = table.column(index)
                storage = [chunk.storage for chunk in column.chunks]
                kind = field.type.storage_type
                table = table.set_column(index, field.name, pa.chunked_array(storage, kind))
        return table.to_batches()


def _named(batch: pa.RecordBatch, name: str, start: int) -> pa.RecordBatch:
    """Name rows that have no name, so that names do not depend on what else is read."""
    if _ITEM_ID in batch.schema.names:
        return batch
    names = [f"{name}_{start + row}" for row in range(batch.num_rows)]
    return batch.append_column(_ITEM_ID, pa.array(names, pa.string()))
