"""Errors that a user can cause and mend.

Each message is one line: what was expected, what came, where, and what to do. The command line
prints it without a traceback and exits with `exit_code`.
"""


class TsmoeError(Exception):
    """Base of every expected error of the product."""

    exit_code = 1


class ConfigError(TsmoeError, ValueError):
    """A setting, option or path that the user gave cannot be used."""

    exit_code = 2


class DataError(TsmoeError, ValueError):
    """A data file, series or shard is missing, damaged or not what it should be."""

    exit_code = 3


class DamagedFileError(DataError):
    """A file is missing or not what was written; trying again would not help."""


class ShardError(DamagedFileError):
    """One shard of a corpus cannot be read; the others may well be."""

    def __init__(self, message: str, *, shard: int) -> None:
        super().__init__(message)
        self.shard = shard
