"""In which shares the sources of a corpus are dealt, and how that changes over a run.

A source's share is proportional to weight x points ** temperature. Caps on domains are then filled
like vessels: what a capped domain may not have goes to the others in their proportions.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_pipeline.shards.reader import Corpus
from tsmoe.config import Section
from tsmoe.data.order import apportion, temperature_weights
from tsmoe.data.permutation import Floats, Integers
from tsmoe.data.windows import WindowIndex
from tsmoe.errors import ConfigError

# Shares are compared after rounding errors of sums.
_TOLERANCE = 1e-9
_OF_MIXTURE = ("source_temperature", "source_weights", "domain_caps")


@dataclass(frozen=True, kw_only=True)
class Mixture(Section):
    """Shares of the sources."""

    source_temperature: float = 0.5
    """A source's share of the windows is its points to this power: 1 keeps proportions, 0 makes
    all sources equal."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """Multiplies the share of each source that is named; 0 leaves it out, the others have 1. With
    source_temperature 0 these are the proportions themselves."""
    domain_caps: dict[str, float] = field(default_factory=dict)
    """Largest share of the windows that a domain may have."""

    def __post_init__(self) -> None:
        if not 0 <= self.source_temperature <= 1:
            raise ValueError(
                f"source_temperature ({self.source_temperature}) must lie between 0 and 1"
            )
        for name, weight in self.source_weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"source_weights.{name} ({weight}) must be a number, at least 0")
        for name, cap in self.domain_caps.items():
            if not 0 <= cap <= 1:
                raise ValueError(f"domain_caps.{name} ({cap}) must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class CurriculumPhase(Section):
    """Steps in which the shares are others than at the start; what is not set is as it is there."""

    from_step: int
    """First step of the phase; it lasts until the next one begins."""
    source_temperature: float | None = None
    source_weights: dict[str, float] | None = None
    domain_caps: dict[str, float] | None = None

    def __post_init__(self) -> None:
        if self.from_step < 1:
            raise ValueError(
                f"from_step ({self.from_step}) must be at least 1; what holds from step 0 stands "
                "in data.source_temperature, data.source_weights and data.domain_caps"
            )
        self.over(Mixture())

    def over(self, start: Mixture) -> Mixture:
        """Return the shares of this phase in a run that starts with others."""
        own = {name: getattr(self, name) for name in _OF_MIXTURE}
        return Mixture(
            **{name: getattr(start, name) if v is None else v for name, v in own.items()}
        )


def check_curriculum(phases: Sequence[CurriculumPhase]) -> None:
    """Check that phases follow one another.

    Raises:
        ValueError: naming the two that do not.
    """
    for before, after in itertools.pairwise(phases):
        if after.from_step <= before.from_step:
            raise ValueError(
                f"curriculum: a phase from_step {after.from_step} follows one from_step "
                f"{before.from_step}; phases must be in order of their steps"
            )


def source_quotas(
    mixture: Mixture, corpus: Corpus, index: WindowIndex, *, section: str = "data"
) -> Integers:
    """Return how many windows of a deck each source has.

    Args:
        mixture: the shares.
        corpus: has the names.
        index: of training windows.
        section: where the shares stand in the configuration, for messages.

    Raises:
        ConfigError: if a name is not in the corpus, nothing is left, or the caps leave windows
            that no domain may have.
    """
    weights = temperature_weights(index.counts, index.points, mixture.source_temperature)
    for name, weight in mixture.source_weights.items():
        weights[_place(name, corpus.sources, f"{section}.source_weights", "source", corpus)] *= (
            weight
        )
    if not (weights > 0).any():
        raise ConfigError(
            f"{section}.source_weights leaves no source of {corpus.path} with a window; the "
            f"sources with windows are {_names(corpus.sources, index.counts > 0)}"
        )
    if not mixture.domain_caps:
        return apportion(weights)
    domain_of = _domains(mixture.domain_caps, corpus, index, section)
    shares = np.bincount(domain_of, weights, minlength=len(corpus.domains)) / weights.sum()
    caps = np.ones(len(corpus.domains))
    for name, cap in mixture.domain_caps.items():
        caps[_place(name, corpus.domains, f"{section}.domain_caps", "domain", corpus)] = cap
    domain_quotas = apportion(_filled(shares, caps, corpus, section))
    quotas = np.zeros_like(index.counts)
    for domain in np.flatnonzero(domain_quotas):
        of_domain = np.flatnonzero((domain_of == domain) & (weights > 0))
        quota = int(domain_quotas[domain])
        if quota < len(of_domain):
            raise ConfigError(
                f"{section}.domain_caps.{corpus.domains[domain]} ({caps[domain]}) is too small "
                f"for its {len(of_domain)} sources: it gives {quota} windows of a deck of 65,536"
            )
        quotas[of_domain] = apportion(weights[of_domain], quota)
    return quotas


def _filled(shares: Floats, caps: Floats, corpus: Corpus, section: str) -> Floats:
    """Cut shares down to their caps and raise the others in proportion, until all fit."""
    room = float(caps[shares > 0].sum())
    if room < 1 - _TOLERANCE:
        named = ", ".join(f"{corpus.domains[d]} {caps[d]:g}" for d in np.flatnonzero(shares > 0))
        raise ConfigError(
            f"{section}.domain_caps allow {room:g} of the windows in all ({named}), and no other "
            f"domain of {corpus.path} has windows; raise them by {1 - room:g} or more"
        )
    is_capped = np.zeros(len(shares), dtype=bool)
    while True:
        rest = shares[~is_capped].sum()
        left = 1 - caps[is_capped & (shares > 0)].sum()
        filled = np.where(is_capped, np.where(shares > 0, caps, 0), 0)
        if rest > 0:
            filled[~is_capped] = shares[~is_capped] / rest * left
        is_over = ~is_capped & (filled > caps + _TOLERANCE)
        if not is_over.any():
            return filled
        is_capped |= is_over


def _domains(
    caps: Mapping[str, float], corpus: Corpus, index: WindowIndex, section: str
) -> Integers:
    """Return the domain of each source; a source of several must have none that is capped."""
    domain_of = np.zeros(len(corpus.sources), dtype=np.int64)
    pairs = np.unique(
        corpus.source_ids[index.series].astype(np.int64) * len(corpus.domains)
        + corpus.domain_ids[index.series]
    )
    for source in np.unique(pairs // len(corpus.domains)):
        domains = pairs[pairs // len(corpus.domains) == source] % len(corpus.domains)
        domain_of[source] = domains[0]
        names = [corpus.domains[domain] for domain in domains]
        capped = [name for name in names if name in caps]
        if len(names) > 1 and capped:
            raise ConfigError(
                f"{section}.domain_caps.{capped[0]}: source {corpus.sources[source]!r} has series "
                f"of several domains ({', '.join(names)}), whose shares cannot be set apart; build "
                "the corpus with a source name for each domain"
            )
    return domain_of


def _place(name: str, known: Sequence[str], setting: str, what: str, corpus: Corpus) -> int:
    if name in known:
        return list(known).index(name)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {_names(known)}"
    raise ConfigError(f"{setting}.{name}: {corpus.path} has no {what} of that name; {hint}")


def _names(known: Sequence[str], which: np.ndarray | None = None) -> str:
    chosen = [name for i, name in enumerate(known) if which is None or which[i]]
    return ", ".join(chosen[:20]) + (f" and {len(chosen) - 20} more" if len(chosen) > 20 else "")
