"""Where a stream comes from: a data set of the hub, a local copy of one, or files of its layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.sources.rows import TARGET
from tsmoe.config import Section
from tsmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

_FILE_KINDS = (".parquet", ".arrow")
# A saved data set is memory-mapped, so that it can be cut into parts wherever one likes.
_SAVED_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class StreamConfig(Section):
    """Train on a data set of the Hugging Face hub as it comes, without a corpus on disk.

    For trying a data set. A corpus is curated, mixed by source, and the same for any number of
    ranks; a stream is none of that.
    """

    path: str
    """Name on the hub, such as thuml/UTSD; a local folder of Parquet or Arrow files or one saved by
    `datasets`; or such files, as data/*.parquet. One series a row, its values in `target`."""
    name: str | None = None
    """Configuration of the data set, such as UTSD-1G."""
    split: str = "train"
    revision: str | None = None
    """Commit or tag on the hub; pin it, so that a run that goes on reads the same data."""
    train_fraction: float = 0.9
    """Share of every series, from its start, that is trained on."""
    windows_per_series: int = 16
    """Windows drawn from a series each time it comes by, at most: long ones would fill batches."""
    mixed_windows: int = 2048
    """Windows that are held and dealt in random order, of `window_length` * 4 bytes each."""
    validation_series: int = 64
    """Series at the beginning of the stream whose ends are validated on."""

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction < 1:
            raise ValueError(
                f"train_fraction must be above 0 and below 1, got {self.train_fraction}: the ends "
                "of series are validated on"
            )
        for name in ("windows_per_series", "mixed_windows", "validation_series"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class StreamSource:
    """A data set that was opened; no row has been read."""

    rows: datasets.IterableDataset
    files: tuple[str, ...]
    """What it is read from: local files with their sizes, or addresses with their commit."""

    def fingerprint(self, config: StreamConfig) -> str:
        """Identify the data set by its definition and its files; their content is not read."""
        path = Path(config.path).expanduser()
        identity = [
            str(path.resolve()) if path.exists() else config.path,
            config.name,
            config.split,
            config.revision,
            config.train_fraction,
            None if self.rows.features is None else str(self.rows.features),
            self.files,
        ]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def open_stream(config: StreamConfig) -> StreamSource:
    """Open the whole data set as a stream.

    Raises:
        ConfigError: if there is no such folder or file, or a saved data set has no such split.
        DataError: if it cannot be reached, or has no column `target`.
    """
    import datasets

    path = Path(config.path).expanduser()
    with reading_errors(config.path):
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            source = _open_saved(path, config.split)
        else:
            if path.suffix in _FILE_KINDS and not path.is_dir():
                kind, files = path.suffix[1:], {config.split: str(path)}
                builder = datasets.load_dataset_builder(kind, config.name, data_files=files)
            else:
                if not path.is_dir() and (path.is_absolute() or config.path.startswith((".", "~"))):
                    raise ConfigError(f"stream.path: there is no folder {path}; check the path")
                name = str(path) if path.is_dir() else config.path
                builder = datasets.load_dataset_builder(name, config.name, revision=config.revision)
            # What load_dataset(.., streaming=True) does; the builder knows files and commit.
            rows = builder.as_streaming_dataset(split=config.split)
            source = StreamSource(rows, _identities(builder.config.data_files, config.split))
        columns = source.rows.column_names
    if columns is not None and TARGET not in columns:
        raise DataError(
            f"{config.path}: no column {TARGET!r} with the values of a series; columns: "
            f"{', '.join(columns)}; build a corpus from it instead"
        )
    return source


@contextmanager
def reading_errors(path: str) -> Iterator[None]:
    """Turn what `datasets` and the network raise into one line."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    # Of the client it speaks through: a connection that is lost while reading comes out as it is.
    http_error: Any = HfHubHTTPError.__mro__[1]  # Any: to mypy it is a plain type
    try:
        yield
    except (ConfigError, DataError):
        raise
    except (OSError, ValueError, http_error, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            hint = "check stream.path; if it is private or gated, log in with `hf auth login`"
        elif isinstance(error, ConnectionError) and datasets.config.HF_HUB_OFFLINE:
            hint = "check stream.path, and unset HF_HUB_OFFLINE, which forbids to ask the hub"
        elif "BatchSize must be greater than 0" in reason:
            # What Arrow says of a Parquet file whose first group of rows is empty.
            hint = "one of its Parquet files has no rows: leave that file out"
        else:
            hint = "check stream.path, stream.name, stream.split and the network"
        raise DataError(f"{path}: cannot be streamed through `datasets` ({reason}); {hint}") from (
            error
        )


def _open_saved(folder: Path, split: str) -> StreamSource:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.Dataset):
        if split not in saved:
            raise ConfigError(
                f"stream.split: {folder} has no split {split!r}; splits: {', '.join(saved)}"
            )
        saved = saved[split]
    files = [file["filename"] for file in saved.cache_files]
    rows = saved.to_iterable_dataset(num_shards=min(_SAVED_SHARDS, max(1, len(saved))))
    return StreamSource(rows, _identities({split: files}, split))


def _identities(data_files: Any, split: str) -> tuple[str, ...]:  # Any: datasets has no types
    """Name the files of a split, of all splits if that is not known; local ones with their size."""
    if not data_files:
        return ()
    chosen = [data_files[split]] if split in data_files else data_files.values()
    names = [str(file) for files in chosen for file in files]
    return tuple(
        f"{name}: {Path(name).stat().st_size} bytes" if Path(name).is_file() else name
        for name in names
    )
