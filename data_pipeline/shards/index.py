"""The series index: what a reader must know of every series before it opens a shard.

One small Arrow file beside the manifest, memory-mapped: a corpus of a million series opens without
touching a shard, which matters most where shards lie in a remote store.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.record import SeriesBatch
from data_pipeline.shards.manifest import IndexEntry
from data_pipeline.storage.store import Store

INDEX_FILE = "series.arrow"

_NAME = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("length", pa.int64(), nullable=False),
        pa.field("source", _NAME, nullable=False),
        pa.field("domain", _NAME, nullable=False),
        pa.field("observed_fraction", pa.float32(), nullable=False),
        pa.field("held_out", pa.bool_(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesIndex:
    """A few numbers per series, in the order of the shards."""

    lengths: NDArray[np.int64]
    """Points of each series."""
    sources: tuple[str, ...]
    """Names of the data sets, sorted."""
    source_ids: NDArray[np.int32]
    """Position in `sources`."""
    domains: tuple[str, ...]
    """Names of the domains, sorted."""
    domain_ids: NDArray[np.int32]
    """Position in `domains`."""
    observed_fractions: NDArray[np.float32]
    """Share of the points that were observed."""
    held_out: NDArray[np.bool_]
    """Whether no point of the series may be trained on."""

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of_shard(cls, batch: SeriesBatch, held_out: Sequence[int] = ()) -> "SeriesIndex":
        """Describe the series of one shard; reads none of their values.

        Args:
            batch: the shard.
            held_out: rows that are never trained on.
        """
        sources, source_ids = _encode(batch.sources)
        domains, domain_ids = _encode(batch.domains)
        is_held_out = np.zeros(len(batch), np.bool_)
        is_held_out[list(held_out)] = True
        return cls(
            lengths=np.diff(batch.offsets),
            sources=sources,
            source_ids=source_ids,
            domains=domains,
            domain_ids=domain_ids,
            observed_fractions=batch.observed_fractions.copy(),  # lets go of the memory map
            held_out=is_held_out,
        )

    @classmethod
    def join(cls, parts: Sequence["SeriesIndex"]) -> "SeriesIndex":
        """Put the indices of the shards of a corpus one after another."""
        sources = tuple(sorted({name for part in parts for name in part.sources}))
        domains = tuple(sorted({name for part in parts for name in part.domains}))
        return cls(
            lengths=np.concatenate([part.lengths for part in parts]),
            sources=sources,
            source_ids=_renumber([(part.sources, part.source_ids) for part in parts], sources),
            domains=domains,
            domain_ids=_renumber([(part.domains, part.domain_ids) for part in parts], domains),
            observed_fractions=np.concatenate([part.observed_fractions for part in parts]),
            held_out=np.concatenate([part.held_out for part in parts]),
        )

    def equals(self, other: "SeriesIndex") -> bool:
        """Whether both say the same of the same series."""
        return (
            (self.sources, self.domains) == (other.sources, other.domains)
            and np.array_equal(self.lengths, other.lengths)
            and np.array_equal(self.source_ids, other.source_ids)
            and np.array_equal(self.domain_ids, other.domain_ids)
            and np.array_equal(self.observed_fractions, other.observed_fractions)
            and np.array_equal(self.held_out, other.held_out)
        )


def write_index(store: Store, index: SeriesIndex) -> IndexEntry:
    """Write the index of a corpus, and return what the manifest says of it.

    Raises:
        DataError: if it cannot be written.
    """
    columns = [
        pa.array(index.lengths),
        pa.DictionaryArray.from_arrays(index.source_ids, pa.array(index.sources, pa.string())),
        pa.DictionaryArray.from_arrays(index.domain_ids, pa.array(index.domains, pa.string())),
        pa.array(index.observed_fractions),
        pa.array(index.held_out),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as file:
        file.write_batch(pa.record_batch(columns, schema=SCHEMA))
    content = sink.getvalue().to_pybytes()
    store.write_bytes(INDEX_FILE, content)
    return IndexEntry(
        file=INDEX_FILE, bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def read_index(path: Path, *, name: str, num_series: int) -> SeriesIndex:
    """Memory-map an index.

    Args:
        path: of the file on local disk.
        name: of the file, for messages.
        num_series: what the manifest says.

    Raises:
        DataError: if it is no index, or one of another number of series.
    """
    try:
        file = pa.ipc.open_file(pa.memory_map(os.fspath(path)))
        if not file.schema.equals(SCHEMA) or file.num_record_batches != 1:
            raise DataError(f"{name}: is no series index; build or copy the corpus again")
        batch = file.get_batch(0)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{name}: the series index cannot be read ({reason}); build or copy the corpus again"
        ) from error
    if batch.num_rows != num_series:
        raise DataError(
            f"{name}: has {batch.num_rows} series, but the manifest has {num_series}; build or "
            f"copy the corpus again"
        )
    source, domain = batch.column("source"), batch.column("domain")
    return SeriesIndex(
        lengths=batch.column("length").to_numpy(),
        sources=tuple(source.dictionary.to_pylist()),
        source_ids=source.indices.to_numpy(),
        domains=tuple(domain.dictionary.to_pylist()),
        domain_ids=domain.indices.to_numpy(),
        observed_fractions=batch.column("observed_fraction").to_numpy(),
        held_out=batch.column("held_out").to_numpy(zero_copy_only=False),  # bits become bytes
    )


def _encode(column: pa.DictionaryArray) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return sorted names, and int32 positions among them."""
    found = tuple(column.dictionary.to_pylist())
    names = tuple(sorted(found))
    return names, _renumber([(found, column.indices.to_numpy())], names)


def _renumber(
    parts: Sequence[tuple[tuple[str, ...], NDArray[np.int32]]], names: tuple[str, ...]
) -> NDArray[np.int32]:
    """Turn positions among the names of each part into positions among all names."""
    position = {name: index for index, name in enumerate(names)}
    return np.concatenate(
        [np.array([position[name] for name in part], np.int32)[ids] for part, ids in parts]
    )
