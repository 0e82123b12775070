"""Building a corpus: sources -> steps -> shards -> manifest, in blocks that stand by themselves."""

from data_pipeline.build.corpus import build_corpus, build_state, up_to_date_manifest
from data_pipeline.build.plan import parse_task

__all__ = ["build_corpus", "build_state", "parse_task", "up_to_date_manifest"]
