"""The order of windows as a pure function of (key, position): nothing is stored, nothing shuffled.

A position is the number of a window in the whole run, counted over all ranks; any rank can compute
the window at any position in O(log sources), so a run resumes from one number and goes on with
another number of ranks in the same order.

Windows are dealt in decks, in which every source has its exact share. Shares may change at certain
positions (phases); how often a source was dealt before a phase is a closed form of the phases
before it, so the epochs of a source go on across phases and a run resumes in any of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tsmoe.data.permutation import Floats, Integers, derived_keys, permute, permute_all
from tsmoe.data.shard_blocks import ShardBlocks

# Windows dealt as one deck: within it each source has its exact share. Large enough that a source
# with 1/65,536 of the weight is still dealt, small enough that shares hold over few steps.
_DECK_BITS = 16
DECK_SIZE = 2**_DECK_BITS


@dataclass(frozen=True)
class Phase:
    """Positions that are dealt in the same shares, until the next phase begins."""

    first_position: int
    quotas: Integers
    """Windows of each source in a deck; they add up to `DECK_SIZE`."""
    first_deck: int = 0
    """Decks begun before the phase."""
    dealt_before: Integers | int = 0
    """Windows of each source that were dealt before the phase."""


class WindowOrder:
    """Deals windows of several sources in given shares, each without repetition per epoch."""

    def __init__(
        self,
        counts: Integers,
        quotas: Sequence[tuple[int, Integers]],
        key: np.uint64,
        *,
        blocks: ShardBlocks | None = None,
    ) -> None:
        """Lay the phases out.

        Args:
            counts: windows of each source; a source without windows is never dealt.
            quotas: first position of each phase, rising from 0, and windows of each source in its
                decks (`apportion`).
            key: see `order_key`.
            blocks: keeps to few shards at a time; without it, all windows of a source are mixed.
        """
        self.counts = counts
        self.key = key
        self.blocks = blocks
        self.phases = [Phase(*quotas[0])]
        for first_position, phase_quotas in quotas[1:]:
            last = self.phases[-1]
            decks = -(-(first_position - last.first_position) // DECK_SIZE)
            self.phases.append(
                Phase(
                    first_position=first_position,
                    quotas=phase_quotas,
                    first_deck=last.first_deck + decks,
                    dealt_before=self._dealt(last, first_position),
                )
            )
        self._first_positions = np.array([phase.first_position for phase in self.phases])
        self._first_decks = np.array([phase.first_deck for phase in self.phases])

    def draw(self, positions: Integers) -> tuple[Integers, Integers]:
        """Return the source and the number of the window within it, for each position."""
        phases = np.searchsorted(self._first_positions, positions, side="right") - 1
        decks, places = np.divmod(positions - self._first_positions[phases], DECK_SIZE)
        decks += self._first_decks[phases]
        source, turn = np.empty_like(positions), np.empty_like(positions)
        for deck in decks[:1] if (decks == decks[:1]).all() else np.unique(decks):
            here = np.flatnonzero(decks == deck)
            phase = self.phases[phases[here[0]]]
            sources, turns = self._deal(phase, int(deck))
            before = (deck - phase.first_deck) * phase.quotas + phase.dealt_before
            source[here] = sources.take(places[here])
            turn[here] = turns.take(places[here]) + before.take(source[here])
        epoch, turn = np.divmod(turn, self.counts[source])
        keys = derived_keys(derived_keys(np.full(len(source), ~self.key), source), epoch)
        if self.blocks is not None:
            return source, self.blocks.permute(source, turn, keys)
        return source, permute(turn, self.counts[source], keys)

    def dealt(self, position: int) -> Integers:
        """Return how many windows of each source come before a position."""
        number = int(np.searchsorted(self._first_positions, position, side="right")) - 1
        return self._dealt(self.phases[number], position)

    def shards_ahead(self, position: int) -> Integers:
        """Return the shards that are read at a position and soon after it, nearest first."""
        if self.blocks is None:
            raise ValueError("without blocks of shards, all shards are read at all times")
        dealt = self.dealt(position)
        quotas = self.phases[
            int(np.searchsorted(self._first_positions, position, side="right")) - 1
        ].quotas
        now, soon = [], []
        for source in np.flatnonzero((quotas > 0) & (self.counts > 0)):
            epoch, turn = divmod(int(dealt[source]), int(self.counts[source]))
            keys = derived_keys(
                derived_keys(np.full(2, ~self.key), np.full(2, source)),
                np.array([epoch, epoch + 1]),
            )
            current, following = self.blocks.neighbours(int(source), turn, keys)
            now.append(current)
            soon.append(following)
        shards = np.concatenate([*now, *soon])
        return shards[np.sort(np.unique(shards, return_index=True)[1])]

    def _dealt(self, phase: Phase, position: int) -> Integers:
        decks, rest = divmod(position - phase.first_position, DECK_SIZE)
        of_rest = np.zeros_like(phase.quotas)
        if rest:
            sources, _ = self._deal(phase, phase.first_deck + decks)
            of_rest = np.bincount(sources[:rest], minlength=len(phase.quotas))
        return phase.dealt_before + decks * phase.quotas + of_rest

    def _deal(self, phase: Phase, deck: int) -> tuple[Integers, Integers]:
        """Return the source at each place of a deck, and how often it was dealt before there."""
        return _deal(phase.quotas.tobytes(), int(self.key), deck)


@functools.lru_cache(maxsize=4)
def _deal(quotas_bytes: bytes, key: int, deck: int) -> tuple[Integers, Integers]:
    # A cache of a pure function: about a millisecond for 65,536 windows, and 1 MB.
    quotas = np.frombuffer(quotas_bytes, dtype=np.int64)
    (deck_key,) = derived_keys(np.array([key], dtype=np.uint64), np.array([deck]))
    cards = permute_all(_DECK_BITS // 2, deck_key)
    # At most 65,536 sources: 16 bits hold their numbers, and are sorted by digits.
    sources = np.arange(len(quotas), dtype=np.int64)[quotas > 0]
    numbers = np.repeat(np.arange(len(sources), dtype=np.uint16), quotas[sources]).take(cards)
    in_order = numbers.argsort(kind="stable")
    turns = np.empty_like(cards)
    firsts = (quotas.cumsum() - quotas)[sources]
    turns[in_order] = np.arange(DECK_SIZE) - np.repeat(firsts, quotas[sources])
    return sources[numbers], turns


def temperature_weights(counts: Integers, sizes: Integers, temperature: float) -> Floats:
    """Weigh each source that has windows by `size ** temperature`.

    Args:
        counts: windows of each source.
        sizes: what shares are proportional to, such as points of each source.
        temperature: 1 keeps the sizes' proportions, 0 gives every source the same weight.
    """
    return np.where(counts > 0, np.maximum(sizes, 1).astype(np.float64) ** temperature, 0)


def apportion(weights: Floats, total: int = DECK_SIZE) -> Integers:
    """Divide `total` by weights into whole numbers, at least 1 for each weight above 0.

    Raises:
        ValueError: if no weight is above 0, or more are than there is to divide.
    """
    is_dealt = weights > 0
    if not is_dealt.any():
        raise ValueError("no source has a window")
    if is_dealt.sum() > total:
        raise ValueError(f"{is_dealt.sum()} sources have windows; at most {total} can be mixed")
    exact = weights / weights.sum() * total
    quotas = np.where(is_dealt, np.maximum(np.floor(exact), 1), 0).astype(np.int64)
    # Hand out what rounding left over to the largest remainders; take back an excess of the
    # at-least-one rule from the largest quota.
    remainder_order = np.argsort(-(exact - quotas), kind="stable")
    missing = total - int(quotas.sum())
    eligible = remainder_order[is_dealt[remainder_order]]
    if missing > 0:
        quotas[eligible[:missing]] += 1
    while missing < 0:
        largest = np.argsort(-quotas, kind="stable")
        largest = largest[quotas[largest] > 1][:-missing]
        quotas[largest] -= 1
        missing += len(largest)
    return quotas
