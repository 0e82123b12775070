"""Records and small corpora for the tests of the corpus store."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from data_pipeline.build import build_corpus
from data_pipeline.config import CorpusConfig
from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.unit import ReadsUnits, Unit
from data_pipeline.steps.clean import CleanConfig

MakeRecord = Callable[..., SeriesRecord]
BuildFrom = Callable[..., Path]


@dataclass(frozen=True, kw_only=True)
class ListedSource(ReadsUnits):
    """A source that yields what it was given; an exception in the list is raised there."""

    items: Sequence[SeriesRecord | Drop | BaseException]
    unit_sizes: tuple[int, ...] = (1,)
    """One unit each; the items are dealt to them in runs."""
    licence: str | None = None

    def anchored(self, folder: Path) -> Self:
        return self

    def files(self) -> tuple[Path, ...]:
        return ()

    def units(self) -> tuple[Unit, ...]:
        return tuple(
            Unit(file="listed", part=part, size_bytes=size)
            for part, size in enumerate(self.unit_sizes)
        )

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        count = len(self.unit_sizes)
        first, last = (len(self.items) * part // count for part in (unit.part, unit.part + 1))
        for item in self.items[first:last]:
            if isinstance(item, BaseException):
                raise item
            yield item


@dataclass(frozen=True, kw_only=True)
class ListedConfig(CorpusConfig):
    """A configuration whose sources have no file format, told apart by a name."""

    name: str = "listed"

    def as_json(self) -> dict:
        return {"name": self.name, "train_fraction": self.train_fraction}


@pytest.fixture
def make_record() -> MakeRecord:
    def make(values: Sequence[float] | np.ndarray, **fields: object) -> SeriesRecord:
        settings: dict = {
            "item_id": "a",
            "start": None,
            "end": None,
            "freq": "h",
            "domain": "Energy",
            "source": "plant",
            "variate": 0,
        }
        return SeriesRecord(**(settings | fields), values=np.asarray(values, np.float32))

    return make


@pytest.fixture
def listed_config() -> Callable[..., ListedConfig]:
    def make(
        items: Sequence[SeriesRecord | Drop | BaseException],
        unit_sizes: tuple[int, ...] = (1,),
        **settings: object,
    ):
        return ListedConfig(sources=[ListedSource(items=items, unit_sizes=unit_sizes)], **settings)

    return make


@pytest.fixture
def build_from(tmp_path: Path, listed_config: Callable[..., ListedConfig]) -> BuildFrom:
    """Build a corpus of these records, with nothing dropped for length, and return its folder."""

    def build(items: Sequence[SeriesRecord | Drop], **settings: object) -> Path:
        settings.setdefault("clean", CleanConfig(min_length=1))
        folder = tmp_path / "corpus"
        build_corpus(listed_config(items, **settings), folder)
        return folder

    return build


@pytest.fixture
def random_records(make_record: MakeRecord) -> list[SeriesRecord]:
    """Series of different lengths, some with gaps: about 14 shards of 4 KiB."""
    generator = np.random.default_rng(0)
    records = []
    for index in range(40):
        values = generator.normal(size=int(generator.integers(40, 700))).astype(np.float32)
        values[generator.random(len(values)) < 0.1] = np.nan
        source = f"set_{index % 3}"
        records.append(make_record(values, item_id=f"s{index}", source=source))
    return records
