"""Errors that a user can cause and mend: each becomes one line and an exit code."""

from data_pipeline.errors import ConfigError, DataError, ShardError, TsmoeError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LostRankError",
    "ShardError",
    "TrainingError",
    "TsmoeError",
]


class CheckpointError(TsmoeError, ValueError):
    """A run folder, checkpoint or package is missing, damaged, or belongs to another model."""

    exit_code = 3


class TrainingError(TsmoeError, RuntimeError):
    """Training met a state it must not go on from, such as a loss that is not finite."""

    exit_code = 1


class LostRankError(TsmoeError, RuntimeError):
    """Another rank is gone or does not answer; it, or its machine, says why."""

    exit_code = 1
