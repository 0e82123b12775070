from pathlib import Path

import pytest

from data_pipeline.config import load_corpus_config
from data_pipeline.errors import ConfigError
from data_pipeline.sources import CsvSource, HubSource, ParquetSource


def write(folder: Path, text: str) -> Path:
    path = folder / "corpus.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_hub_names_stay(tmp_path) -> None:
    (tmp_path / "copy").mkdir()
    text = """
sources:
  - {type: parquet, path: "a/*.parquet", domain: Energy}
  - {type: csv, path: b.csv, columns: [x, y]}
  - {type: hub, name: UTSD-1G}
  - {type: hub, path: copy, streaming: false}
clean: {min_length: 96}
"""
    config = load_corpus_config(write(tmp_path, text))
    parquet, csv, hub, local = config.sources
    assert parquet == ParquetSource(path=str(tmp_path / "a/*.parquet"), domain="Energy")
    assert csv == CsvSource(path=str(tmp_path / "b.csv"), columns=("x", "y"))
    assert hub == HubSource(path="thuml/UTSD", name="UTSD-1G")
    assert local == HubSource(path=str(tmp_path / "copy"), streaming=False)
    assert config.clean.min_length == 96
    assert config.train_fraction == 0.9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sources: [{type: csv, pathh: x}]", "sources.0.pathh: unknown key; known keys: path"),
        ("sources: [{type: csv}]", "sources.0.path: the key is required"),
        ("sources: [{path: x}]", "sources.0: the key `type` is required; types: parquet, csv, hub"),
        ("sources: [{type: xls, path: x}]", "sources.0: unknown type 'xls'; types: parquet"),
        (
            "sources: [{type: csv, path: 3}]",
            "sources.0.path: Input should be a valid string, got 3",
        ),
        ("sources: []", "sources must name at least one source"),
        *(
            (
                f"sources: [{{type: csv, path: x}}]\n{section}: {{wrong: 1}}",
                f"{section}.wrong: unknown key; known keys: {first}",
            )
            for section, first in (
                ("resample", "freq"),
                ("quality", "constant_window"),
                ("clean", "min_length"),
                ("duplicates", "exact"),
                ("mixup", "share"),
            )
        ),
        (
            "sources: [{type: csv, path: x}]\nheld_out_fraction: 1",
            "held_out_fraction must be in [0, 1), got 1",
        ),
        (
            "sources: [{type: csv, path: x}]\ntrain_fraction: 1.5",
            "train_fraction must be in (0, 1]",
        ),
        (
            "sources: [{type: csv, path: x}]\nclean: {min_len: 3}",
            "clean.min_len: unknown key; known keys: min_length",
        ),
        (
            "sources: [{type: csv, path: x}]\nclean: {max_missing_fraction: 2}",
            "clean: max_missing_fraction must be between 0 and 1, got 2",
        ),
        (
            "sources: [{type: parquet, path: x, layout: series, columns: [a]}]",
            "sources.0: time_column and columns are for layout: wide",
        ),
        ("source: []", "source: unknown key; known keys: sources, resample"),
        ("- a\n", "expected keys"),
        ("sources: [\n", "not valid YAML"),
    ],
)
def test_bad_settings_name_file_and_key_in_one_line(tmp_path, text, words) -> None:
    with pytest.raises(ConfigError) as caught:
        load_corpus_config(write(tmp_path, text))
    assert words in str(caught.value)
    assert "corpus.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_corpus_config(tmp_path / "none.yaml")


def test_hash_changes_with_every_setting(tmp_path) -> None:
    text = "sources: [{type: csv, path: x}]\n"
    hashes = {
        load_corpus_config(write(tmp_path, text + extra)).content_hash()
        for extra in ("", "train_fraction: 0.8", "clean: {min_length: 5}", "shard_size_bytes: 8192")
    }
    assert len(hashes) == 4
