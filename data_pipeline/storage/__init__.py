"""Where a corpus lies: local folders and remote stores, and the node's cache of remote files."""

from data_pipeline.storage.cache import CachedFile, FileCache
from data_pipeline.storage.retry import RetryPolicy
from data_pipeline.storage.store import Store

__all__ = ["CachedFile", "FileCache", "RetryPolicy", "Store"]
