"""Extra series mixed from the kept ones: TSMixup, as a step of the build.

A mixture is a weighted mean of pieces of a few series, each divided by its own mean size, so that
patterns meet that no single recording holds. Each block of a build mixes its own series, and what
comes out depends on nothing but the seed, the name of the block and its series.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict

from data_pipeline.record import SeriesRecord
from data_pipeline.steps.split import train_length

SOURCE = "tsmixup"
DOMAIN = "Synthetic"


@dataclass(frozen=True, kw_only=True)
class MixupConfig:
    """How many mixtures are made, and of what."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    share: float = 0.1
    """Mixtures per kept series, at least 0."""
    max_components: int = 3
    """Most series in one mixture; at least 2. Chronos: 3."""
    alpha: float = 1.5
    """Concentration of the Dirichlet distribution of the weights: 1 is uniform, large is even."""
    min_length: int = 128
    """Shortest mixture, in points."""
    max_length: int = 2048
    """Longest mixture, in points."""
    reservoir_size: int = 1024
    """Pieces that are held to mix from, of `max_length` points each: 8 MB with the defaults."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < math.inf:
            raise ValueError(f"share must be at least 0, got {self.share}")
        if self.max_components < 2:
            raise ValueError(f"max_components must be at least 2, got {self.max_components}")
        if not self.alpha > 0.0:
            raise ValueError(f"alpha must be positive, got {self.alpha}")
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length ({self.min_length}) must be at least 1 and at most max_length "
                f"({self.max_length})"
            )
        if self.reservoir_size < self.max_components:
            raise ValueError(
                f"reservoir_size ({self.reservoir_size}) must be at least max_components "
                f"({self.max_components})"
            )


class SeriesMixer:
    """Takes the kept series of a block one by one, and mixes extra ones at its end.

    Args:
        config: how.
        train_fraction: only this part of a series, from its start, is mixed; no mixture has seen a
            validation point.
        block: name of the block; enters the random numbers and the names of the mixtures.

    Source: Chronos (arXiv 2403.07815), section 4.1 and algorithm 1. Departures: at least two series
    make a mixture, as the originals are in the corpus by themselves, and a copy of one up to its
    scale would be taken out as a duplicate; the pieces come from one block, not from all data sets.
    """

    def __init__(self, config: MixupConfig, train_fraction: float, block: str) -> None:
        self.config = config
        self.train_fraction = train_fraction
        self.block = block
        digest = hashlib.sha256(f"{config.seed}/{block}".encode()).digest()
        self._random = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        self._pieces: dict[str, list[np.ndarray]] = {}
        """By data set, in the order in which the data sets came."""
        self._num_pieces = 0
        self._num_kept = 0
        self._num_fit = 0

    def add(self, record: SeriesRecord) -> None:
        """Take a kept series into account; a piece of it may be held, whatever its length."""
        self._num_kept += 1
        end = train_length(len(record.values), self.train_fraction)
        if end < self.config.min_length:
            return
        self._num_fit += 1
        length = min(end, self.config.max_length)
        start = int(self._random.integers(end - length + 1))
        # A fair sample of bounded size: the n-th series enters with probability size / n.
        place = int(self._random.integers(self._num_fit))
        is_full = self._num_pieces == self.config.reservoir_size
        if is_full and place >= self.config.reservoir_size:
            return
        piece = record.values[start : start + length].astype(np.float32)  # a copy
        if not np.abs(np.nan_to_num(piece)).any():
            return  # nothing to divide by
        if is_full:
            self._forget(place)
        self._pieces.setdefault(record.source, []).append(piece)
        self._num_pieces += 1

    def mixed(self) -> Iterator[SeriesRecord]:
        """Yield the mixtures; call it once, after all series were added.

        The number is `share` times the kept series, rounded up or down at random, so that blocks of
        a few series count as well. None can be made of fewer than two pieces.
        """
        count = int(self.config.share * self._num_kept + self._random.random())
        if self._num_pieces < 2:
            return
        for index in range(count):
            values = self._mix()
            yield SeriesRecord(
                item_id=f"{SOURCE}_{self.block}_{index}",
                start=None,
                end=None,
                freq=None,
                domain=DOMAIN,
                source=SOURCE,
                variate=0,
                values=values,
            )

    def _mix(self) -> np.ndarray:
        config = self.config
        most = min(config.max_components, self._num_pieces)
        num_components = int(self._random.integers(2, most + 1))
        wanted = int(self._random.integers(config.min_length, config.max_length + 1))
        pieces = self._draw(num_components)
        # Ours: where a series is shorter than what was drawn, the mixture is as long as that one.
        length = min([wanted, *map(len, pieces)])
        weights = self._random.dirichlet(np.full(num_components, config.alpha))
        mixture = np.zeros(length)
        for weight, piece in zip(weights, pieces, strict=True):
            start = int(self._random.integers(len(piece) - length + 1))
            part = piece[start : start + length].astype(np.float64)
            mixture += weight * part / _mean_size(part)
        return mixture.astype(np.float32)

    def _draw(self, count: int) -> list[np.ndarray]:
        """Choose different pieces: a data set evenly, then one of its pieces evenly."""
        names = list(self._pieces)
        drawn: dict[tuple[str, int], np.ndarray] = {}
        while len(drawn) < count:
            name = names[int(self._random.integers(len(names)))]
            place = int(self._random.integers(len(self._pieces[name])))
            drawn[name, place] = self._pieces[name][place]
        return list(drawn.values())

    def _forget(self, place: int) -> None:
        for name, pieces in self._pieces.items():
            if place < len(pieces):
                del pieces[place]
                if not pieces:
                    del self._pieces[name]
                break
            place -= len(pieces)
        self._num_pieces -= 1


def _mean_size(values: np.ndarray) -> float:
    """Mean of the absolute values of the observed points; 1 where that says nothing."""
    observed = np.abs(values[~np.isnan(values)])
    size = float(observed.mean()) if observed.size else 0.0
    return size if size > 0.0 else 1.0
