"""The corpus configuration: which sources, what is left out, where series are split."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.errors import ConfigError
from data_pipeline.shards.writer import DEFAULT_SHARD_SIZE_BYTES
from data_pipeline.similarity.duplicates import DuplicatesConfig
from data_pipeline.sources import SOURCE_TYPES, SourceConfig
from data_pipeline.steps.clean import CleanConfig
from data_pipeline.steps.mixup import MixupConfig
from data_pipeline.steps.quality import QualityConfig
from data_pipeline.steps.resample import ResampleConfig
from data_pipeline.steps.split import DEFAULT_TRAIN_FRACTION


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """How a corpus is built."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sources: list[SourceConfig]
    """Read in this order; series keep it."""
    resample: ResampleConfig | None = None
    """Bring finer series to a coarser interval first; null leaves all as they are."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """What is measured of every series."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """Which series are left out."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Which copies of other series are left out."""
    mixup: MixupConfig | None = None
    """Mix extra series out of those that are kept; null makes none."""
    train_fraction: float = DEFAULT_TRAIN_FRACTION
    """Share of every series, from its start, that may be trained on; in (0, 1]."""
    held_out_fraction: float = 0.0
    """Share of recordings, chosen by their names, of which nothing is trained on; in [0, 1)."""
    shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES
    """Values per shard file, in bytes; building holds one shard in memory."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources must name at least one source")
        if not 0.0 < self.train_fraction <= 1.0:
            raise ValueError(f"train_fraction must be in (0, 1], got {self.train_fraction}")
        if not 0.0 <= self.held_out_fraction < 1.0:
            raise ValueError(f"held_out_fraction must be in [0, 1), got {self.held_out_fraction}")
        self.clean.check_measured(self.quality)
        if self.shard_size_bytes < 4096:
            raise ValueError(f"shard_size_bytes must be at least 4096, got {self.shard_size_bytes}")

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """Return the configuration as plain JSON values."""
        return _ADAPTER.dump_python(self, mode="json")

    def content_hash(self) -> str:
        """Hash every setting; equal hashes mean the same build."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


_ADAPTER = TypeAdapter(CorpusConfig)
_SECTIONS: dict[str, type] = {
    "resample": ResampleConfig,
    "quality": QualityConfig,
    "clean": CleanConfig,
    "duplicates": DuplicatesConfig,
    "mixup": MixupConfig,
}
_SOURCE_BY_TAG = {source.type: source for source in SOURCE_TYPES}


def load_corpus_config(path: str | Path) -> CorpusConfig:
    """Read a corpus YAML; paths in it are relative to its folder.

    Raises:
        ConfigError: naming the file and the key.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: is not valid YAML ({reason})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys such as `sources:`, got {content!r:.60}")
    config = decode_corpus_config(content, where=path.name)
    anchored = [source.anchored(path.parent) for source in config.sources]
    return dataclasses.replace(config, sources=anchored)


def decode_corpus_config(content: dict[str, Any], *, where: str) -> CorpusConfig:
    """Check plain values and build the configuration; paths stay as they are.

    Args:
        content: what the YAML holds.
        where: name for messages.

    Raises:
        ConfigError: naming the first bad key with its path.
    """
    try:
        return _ADAPTER.validate_python(content)
    except ValidationError as error:
        # Any: pydantic's error details
        details: list[Any] = sorted(error.errors(), key=lambda item: -_is_unknown_key(item))
        raise ConfigError(f"{where}: {_describe(details[0], content)}") from error


def _is_unknown_key(detail: dict[str, Any]) -> bool:
    return detail["type"] == "unexpected_keyword_argument"


def _describe(detail: dict[str, Any], content: dict[str, Any]) -> str:
    """Say in one line what is wrong with which key."""
    location = list(detail["loc"])
    # pydantic puts the tag of a union between the index and the field: sources.0.csv.path
    if location[:1] == ["sources"] and len(location) > 2:
        del location[2]
    key = ".".join(str(part) for part in location)
    prefix = f"{key}: " if key else ""
    types = ", ".join(_SOURCE_BY_TAG)
    match detail["type"]:
        case "unexpected_keyword_argument":
            known = ", ".join(_known_keys(location[:-1], content))
            return f"{prefix}unknown key; known keys: {known}"
        case "missing":
            return f"{prefix}the key is required"
        case "union_tag_not_found":
            return f"{prefix}the key `type` is required; types: {types}"
        case "union_tag_invalid":
            return f"{prefix}unknown type {detail['ctx']['tag']!r}; types: {types}"
        case "value_error":
            return f"{prefix}{detail['ctx']['error']}"
        case _:
            return f"{prefix}{detail['msg']}, got {detail['input']!r:.80}"


def _known_keys(location: list[Any], content: dict[str, Any]) -> list[str]:
    section: type = CorpusConfig
    if location[:1] == ["sources"]:
        section = _SOURCE_BY_TAG[content["sources"][location[1]]["type"]]
    elif location:
        section = _SECTIONS[location[0]]
    return [item.name for item in dataclasses.fields(section)]
