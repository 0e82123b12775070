"""Files that are whole or not there; see `data_pipeline.storage.durable`."""

from data_pipeline.storage.durable import PARTIAL_SUFFIX, durable_file

__all__ = ["PARTIAL_SUFFIX", "durable_file"]
