"""The embedded corpus and evaluation table: small, real, redistributable. Credits: NOTICE.md."""

from pathlib import Path

TINY_CORPUS_CONFIG = Path(__file__).parent / "corpus.yaml"
"""Corpus configuration of the embedded series."""
EVALUATION_TABLE = Path(__file__).parent / "eval_jfk_weather.parquet"
"""Hourly weather of JFK airport, 2013; its last fifth (from 2013-10-19 06:00) is the test part."""
