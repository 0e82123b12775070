"""Which series are left out of a corpus, and under which name that is counted.

Nothing is repaired: a series is kept as recorded, gaps as NaN, or dropped whole with a reason.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from data_pipeline.record import SeriesRecord
from data_pipeline.steps.split import train_length

NOT_NUMERIC = "not_numeric"
"""The source row holds no list of numbers; sources give this reason themselves."""
BAD_TIMESTAMP = "bad_timestamp"
"""The start or end of the source row cannot be read as a time; given by sources."""
TOO_SHORT = "too_short"
INFINITE = "infinite"
NO_OBSERVATION = "no_observation"
TOO_MANY_MISSING = "too_many_missing"
CONSTANT = "constant"
DUPLICATE = "duplicate"


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Thresholds for leaving a series out."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    min_length: int = 32
    """Fewest points of a series; shorter ones hold no window. Reason `too_short`."""
    max_missing_fraction: float = 0.5
    """Largest share of points that may be missing, in [0, 1]. Reason `too_many_missing`.

    Ours: the papers publish no threshold. Half is lenient because a missing point is masked
    out of the loss, not filled in.
    """
    drops_constant: bool = True
    """Leave out series whose training part never changes: they have no scale. Reason `constant`."""
    drops_duplicates: bool = True
    """Leave out exact copies of an earlier series; keeps 20 bytes a series in memory."""

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise ValueError(f"min_length must be at least 1, got {self.min_length}")
        if not 0.0 <= self.max_missing_fraction <= 1.0:
            raise ValueError(
                f"max_missing_fraction must be between 0 and 1, got {self.max_missing_fraction}"
            )


class Cleaner:
    """Decides on series one after another; remembers the hashes of those it kept.

    Args:
        config: the thresholds.
        train_fraction: the training part decides whether there is anything to learn from.
    """

    def __init__(self, config: CleanConfig, train_fraction: float) -> None:
        self.config = config
        self.train_fraction = train_fraction
        self._seen: set[bytes] = set()

    def reason_to_drop(self, record: SeriesRecord) -> str | None:
        """Name why the series is left out, or return None to keep it."""
        values = record.values
        if len(values) < self.config.min_length:
            return TOO_SHORT
        if np.isinf(values).any():
            return INFINITE
        missing = np.isnan(values)
        # The training part alone decides: a scale taken from it must exist, and looking at the
        # rest would let the validation part choose what is trained on.
        end = train_length(len(values), self.train_fraction)
        training = values[:end][~missing[:end]]
        if training.size == 0:
            return NO_OBSERVATION
        if missing.mean() > self.config.max_missing_fraction:
            return TOO_MANY_MISSING
        if self.config.drops_constant and training.min() == training.max():
            return CONSTANT
        if self.config.drops_duplicates and self._is_known(values):
            return DUPLICATE
        return None

    def _is_known(self, values: np.ndarray) -> bool:
        digest = hashlib.sha1(np.ascontiguousarray(values).data, usedforsecurity=False).digest()
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False
