"""Fixtures of the tests that need a remote store."""

from remote_walks import local, proxy, server, store, uploaded

__all__ = ["local", "proxy", "server", "store", "uploaded"]
