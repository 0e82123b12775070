"""Sources of series. A source is a frozen config with a `type` tag and these methods:

`anchored(folder)` resolves paths against the folder of the corpus YAML, `files()` lists the local
files it reads, `units()` the pieces that are read by themselves, and `read(unit)` yields each
series of a piece as a `SeriesRecord`, or as a `Drop` where a row holds none. A new source is one
file here and one line in the union.
"""

from typing import Annotated

from pydantic import Field

from data_pipeline.sources.csv import CsvSource
from data_pipeline.sources.gluonts import GluontsSource
from data_pipeline.sources.hub import HubSource
from data_pipeline.sources.jsonl import JsonlSource
from data_pipeline.sources.npy import NpySource
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.saved import SavedSource
from data_pipeline.sources.synthetic import SyntheticSource
from data_pipeline.sources.time300b import Time300bSource
from data_pipeline.sources.tsf import TsfSource

SOURCE_TYPES = (
    ParquetSource,
    CsvSource,
    HubSource,
    NpySource,
    Time300bSource,
    TsfSource,
    JsonlSource,
    GluontsSource,
    SavedSource,
    SyntheticSource,
)
SourceConfig = Annotated[
    ParquetSource
    | CsvSource
    | HubSource
    | NpySource
    | Time300bSource
    | TsfSource
    | JsonlSource
    | GluontsSource
    | SavedSource
    | SyntheticSource,
    Field(discriminator="type"),
]

__all__ = [
    "SOURCE_TYPES",
    "CsvSource",
    "GluontsSource",
    "HubSource",
    "JsonlSource",
    "NpySource",
    "ParquetSource",
    "SavedSource",
    "SourceConfig",
    "SyntheticSource",
    "Time300bSource",
    "TsfSource",
]
