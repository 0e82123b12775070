"""The corpus store: memory-mapped Arrow shards and the manifest that vouches for them."""

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import Corpus

__all__ = ["Corpus", "Manifest"]
