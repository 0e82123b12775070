"""Series that are drawn by chance: samples of Gaussian processes, and trends with seasons.

Every series is a function of (kind, seed, number, length range) alone, so that the corpus is the
same for any number of tasks and threads. Between kinds of processors the last bits may differ:
numpy's exponentials and sines use the widest vector instructions that are there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import ConfigDict

from data_pipeline.record import Drop, SeriesRecord
from data_pipeline.sources.blocks import UNIT_BYTES
from data_pipeline.sources.kernel_synth import sample_kernel_series
from data_pipeline.sources.trend_seasonal import sample_trend_seasonal_series
from data_pipeline.sources.unit import ReadsUnits, Unit

_SERIES_PER_UNIT = 512
"""Some seconds of work for `kernel` at its default length."""
_LONGEST_KERNEL_SERIES = 2**14

_SAMPLERS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "kernel": sample_kernel_series,
    "trend_seasonal": sample_trend_seasonal_series,
}


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(ReadsUnits):
    """Series without a file: drawn anew, and alike, whenever they are read."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    type: Literal["synthetic"] = "synthetic"
    kind: Literal["kernel", "trend_seasonal"] = "kernel"
    """`kernel`: KernelSynth of Chronos (arXiv 2403.07815); its cost grows with the square of the
    length, 12 ms at 1,024 points. `trend_seasonal`: trend, seasons, noise, level shifts and
    spikes; fast at any length."""
    num_series: int
    """How many series to draw."""
    min_length: int = 1024
    """Points of the shortest series; lengths are drawn evenly between the two."""
    max_length: int = 1024
    """Points of the longest series; at most 16,384 for `kernel`."""
    seed: int = 0
    """Another seed gives other series; a larger `num_series` only adds to them."""
    domain: str = "Synthetic"
    """Domain of every series."""
    source: str | None = None
    """Name of the data set; "synthetic_" and the kind if not given."""
    freq: str | None = None
    """pandas alias of the sampling interval; the series have no calendar of their own."""
    licence: str | None = None
    """Licence of the data, copied to the manifest."""

    def __post_init__(self) -> None:
        if self.num_series < 1:
            raise ValueError(f"num_series must be at least 1, got {self.num_series}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 2 <= self.min_length <= self.max_length:
            raise ValueError(
                f"min_length ({self.min_length}) must be at least 2 and at most max_length "
                f"({self.max_length})"
            )
        if self.kind == "kernel" and self.max_length > _LONGEST_KERNEL_SERIES:
            raise ValueError(
                f"max_length is {self.max_length}, but kind: kernel takes at most "
                f"{_LONGEST_KERNEL_SERIES}, as its cost grows with the square; use kind: "
                f"trend_seasonal for longer ones"
            )

    def anchored(self, folder: Path) -> Self:  # noqa: ARG002
        """Return the same source: it has no path."""
        return self

    def files(self) -> tuple[Path, ...]:
        """Return none: nothing is read."""
        return ()

    def units(self) -> tuple[Unit, ...]:
        """Cut the numbers of the series into ranges, shorter where the series are long."""
        mean_bytes = 2 * (self.min_length + self.max_length)
        return tuple(
            Unit(file="", part=part, size_bytes=mean_bytes * len(self._numbers(part)))
            for part in range(-(-self.num_series // self._series_per_unit))
        )

    def read(self, unit: Unit) -> Iterator[SeriesRecord | Drop]:
        """Draw the series of one range."""
        source = self.source or f"synthetic_{self.kind}"
        for number in self._numbers(unit.part):
            generator = np.random.default_rng((self.seed, number))
            length = int(generator.integers(self.min_length, self.max_length, endpoint=True))
            yield SeriesRecord(
                item_id=f"{source}_{self.seed}_{number}",
                start=None,
                end=None,
                freq=self.freq,
                domain=self.domain,
                source=source,
                variate=0,
                values=_SAMPLERS[self.kind](generator, length).astype(np.float32),
            )

    @property
    def _series_per_unit(self) -> int:
        return max(1, min(_SERIES_PER_UNIT, UNIT_BYTES // (4 * self.max_length)))

    def _numbers(self, part: int) -> range:
        first = part * self._series_per_unit
        return range(first, min(first + self._series_per_unit, self.num_series))
