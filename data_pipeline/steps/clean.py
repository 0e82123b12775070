"""Which series are left out of a corpus, and under which name that is counted.

Nothing is repaired: a series is kept as recorded, gaps as NaN, or dropped whole with a reason. In
particular no gap is interpolated, short or long. A drawn line is easy to predict, so a model would
be rewarded for learning it, and afterwards nobody can tell it from what was recorded; a missing
point is masked out of the loss instead, which costs nothing but the point.
"""

from dataclasses import dataclass

from pydantic import ConfigDict

from data_pipeline.steps.quality import Measurements, QualityConfig

NOT_NUMERIC = "not_numeric"
"""The source row holds no list of numbers; sources give this reason themselves."""
BAD_TIMESTAMP = "bad_timestamp"
"""The start or end of the source row cannot be read as a time; given by sources."""
NOT_UTF8 = "not_utf8"
"""A name in the source row is not UTF-8; given by sources."""
REPEATED_TIMES = "repeated_times"
"""Two rows of a long table give values of the series for one time; given by sources."""
CLOCK_CHANGE = "clock_change"
"""Times without a zone show that a clock was changed on the way; given by sources."""
IRREGULAR_TIMES = "irregular_times"
"""The times of the series stand on no regular grid; given by sources."""
TOO_SHORT = "too_short"
INFINITE = "infinite"
NO_OBSERVATION = "no_observation"
TOO_MANY_MISSING = "too_many_missing"
GAP_TOO_LONG = "gap_too_long"
CONSTANT = "constant"
MOSTLY_CONSTANT = "mostly_constant"
CLIPPED = "clipped"
SPIKY = "spiky"
NOT_STATIONARY = "not_stationary"
UNPREDICTABLE = "unpredictable"


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Thresholds for leaving a series out; those that are null leave none out.

    The papers publish no thresholds, so all defaults are ours.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    min_length: int = 32
    """Fewest points of a series; shorter ones hold no window. Reason `too_short`."""
    max_missing_fraction: float = 0.2
    """Largest share of points that may be missing, in [0, 1]. Reason `too_many_missing`."""
    max_gap_fraction: float | None = 0.05
    """Longest run of missing points, as a share of the length. Reason `gap_too_long`."""
    drops_constant: bool = True
    """Leave out series whose training part never changes: they have no scale. Reason `constant`."""
    max_constant_fraction: float | None = 0.5
    """Largest share of windows in which nothing changes. Reason `mostly_constant`."""
    max_clipped_fraction: float | None = 0.2
    """Largest share of points that lie flat at the end of the range. Reason `clipped`.

    At 0.1, half of what it drops of 55 real data sets are machines that idle, not sensors.
    """
    max_spike_fraction: float | None = 0.25
    """Largest share of points that jump out and back. Reason `spiky`.

    High on purpose: at 0.1 it drops dry-land rain, trades and bursts of load, which are what they
    look like. A reading that flips to an error code and back every other time is what is left.
    """
    max_adf: float | None = None
    """Largest ADF statistic; series above it wander. Reason `not_stationary`.

    Off, since trends are to be learned too; UTSD reports the statistic and drops nothing by it.
    """
    min_forecastability: float | None = None
    """Smallest forecastability; series below it are near to white noise. Reason `unpredictable`."""

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise ValueError(f"min_length must be at least 1, got {self.min_length}")
        for name in (
            "max_missing_fraction",
            "max_gap_fraction",
            "max_constant_fraction",
            "max_clipped_fraction",
            "max_spike_fraction",
            "min_forecastability",
        ):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")

    def check_measured(self, quality: QualityConfig) -> None:
        """Refuse a threshold for something that is not measured.

        Raises:
            ValueError: naming both settings.
        """
        for threshold, measure in (
            ("max_clipped_fraction", "measures_clipping"),
            ("max_spike_fraction", "measures_spikes"),
            ("max_adf", "measures_stationarity"),
            ("min_forecastability", "measures_forecastability"),
        ):
            value = getattr(self, threshold)
            if value is not None and not getattr(quality, measure):
                raise ValueError(
                    f"clean.{threshold} is {value}, but quality.{measure} is false; set "
                    f"clean.{threshold} to null, or measure it"
                )


def reason_to_drop(measured: Measurements, config: CleanConfig) -> str | None:
    """Name why a series is left out, the first reason that holds, or return None to keep it.

    A measurement that is NaN, since it could not be taken, drops nothing.
    """
    faults = (
        (TOO_SHORT, measured.length < config.min_length),
        (INFINITE, measured.has_infinite),
        # The training part alone decides on NO_OBSERVATION and CONSTANT: a scale taken from it must
        # exist, and looking at the rest would let the validation part choose what is trained on.
        (NO_OBSERVATION, measured.train_observed == 0),
        (TOO_MANY_MISSING, _above(measured.missing_fraction, config.max_missing_fraction)),
        (GAP_TOO_LONG, _above(measured.longest_gap_fraction, config.max_gap_fraction)),
        (CONSTANT, config.drops_constant and measured.train_is_constant),
        (MOSTLY_CONSTANT, _above(measured.constant_fraction, config.max_constant_fraction)),
        (CLIPPED, _above(measured.clipped_fraction, config.max_clipped_fraction)),
        (SPIKY, _above(measured.spike_fraction, config.max_spike_fraction)),
        (NOT_STATIONARY, _above(measured.adf, config.max_adf)),
        (UNPREDICTABLE, _below(measured.forecastability, config.min_forecastability)),
    )
    return next((reason for reason, holds in faults if holds), None)


def _above(value: float, threshold: float | None) -> bool:
    return threshold is not None and value > threshold


def _below(value: float, threshold: float | None) -> bool:
    return threshold is not None and value < threshold
