"""Small corpora on disk, in which every value tells its series and its place."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.record import SeriesRecord
from data_pipeline.shards import Corpus
from data_pipeline.shards.manifest import Manifest, SourceEntry, corpus_fingerprint
from data_pipeline.shards.writer import ShardWriter

MakeCorpus = Callable[..., Corpus]


def value_at(series: int, place: int) -> int:
    """Point of a series of the corpora below; exact in float32."""
    return 10_000 * series + place


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """Write series of these lengths, by source; a small shard size gives several shards."""

    def make(
        lengths: Mapping[str, Sequence[int]],
        *,
        train_fraction: float = 0.75,
        shard_size_bytes: int = 4096,
        missing: Sequence[tuple[int, int]] = (),
        domains: Mapping[str, str] | None = None,
        held_out: Sequence[int] = (),
    ) -> Corpus:
        folder = tmp_path / f"corpus{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        writer = ShardWriter(
            folder, train_fraction=train_fraction, shard_size_bytes=shard_size_bytes
        )
        number = 0
        for source, of_source in lengths.items():
            for length in of_source:
                values = value_at(number, 0) + np.arange(length, dtype=np.float32)
                values[[place for series, place in missing if series == number]] = np.nan
                writer.add(
                    SeriesRecord(
                        item_id=f"s{number}",
                        start=None,
                        end=None,
                        freq="h",
                        domain=(domains or {}).get(source, "Test"),
                        source=source,
                        variate=0,
                        values=values,
                    ),
                    is_held_out=number in held_out,
                )
                number += 1
        shards = writer.close()
        Manifest(
            fingerprint=corpus_fingerprint(shards, train_fraction),
            train_fraction=train_fraction,
            shards=shards,
            sources={source: SourceEntry(series=len(of)) for source, of in lengths.items()},
            drops={},
            config={},
            config_hash="",
            inputs=[],
        ).write(folder)
        return Corpus.open(folder)

    return make
