"""What ranks found, by whom, and the rows that are made of it.

A check is judged by a pure function over the findings of all ranks, so that it can be tried with
findings of machines that are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

F = TypeVar("F")
K = TypeVar("K", bound=Hashable)

GIB = 2**30
# How many nodes a row names.
_NODES_NAMED = 6


class Verdict(StrEnum):
    """What is made of what was found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"
    """Not checked, because something that it needs failed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""
    """What to do; empty where all is well."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    node: str


@dataclass(frozen=True)
class Told(Generic[F]):
    """The findings of all ranks that had any."""

    check: str
    findings: dict[int, F]
    """By rank."""
    places: dict[int, Place]
    """Of every rank that is there."""

    def groups(self, key: Callable[[F], K]) -> dict[K, list[int]]:
        """Sort the ranks by something in their findings; the largest group comes first."""
        groups: dict[K, list[int]] = {}
        for rank, finding in sorted(self.findings.items()):
            groups.setdefault(key(finding), []).append(rank)
        return dict(sorted(groups.items(), key=lambda item: -len(item[1])))

    def by_node(self) -> dict[str, dict[int, F]]:
        """Sort the findings by node."""
        nodes: dict[str, dict[int, F]] = {}
        for rank, finding in sorted(self.findings.items()):
            nodes.setdefault(self.places[rank].node, {})[rank] = finding
        return nodes

    def where(self, ranks: Iterable[int]) -> str:
        """Name ranks by their nodes."""
        return where(ranks, self.places)

    def row(self, verdict: Verdict, found: str, advice: str = "") -> Row:
        """Make a row of this check."""
        return Row(check=self.check, verdict=verdict, found=found, advice=advice)

    def unlike(
        self,
        what: str,
        key: Callable[[F], str],
        advice: str,
        *,
        verdict: Verdict = Verdict.FAIL,
    ) -> list[Row]:
        """Fail where the ranks differ in something, and say who has what."""
        groups = self.groups(key)
        if len(groups) < 2:
            return []
        found = "; ".join(f"{value} on {self.where(ranks)}" for value, ranks in groups.items())
        return [self.row(verdict, f"{what} differs: {found}", advice)]


@dataclass(frozen=True, kw_only=True)
class Check(Generic[F]):
    """One thing to look at."""

    name: str
    finding: type[F]
    look: Callable[[Any], F]
    """Takes the `Scene`; runs on every rank, in the same thread."""
    judge: Callable[[Told[F]], list[Row]]
    needs: tuple[str, ...] = ()
    """Checks that must not have failed before."""
    once_per_node: bool = False
    """One rank of each node looks."""

    def read(self, values: dict[str, Any]) -> F:
        """Make a finding of what its fields were sent as."""
        return self.finding(**values)


def values_of(finding: Any) -> dict[str, Any]:  # a dataclass, of the check's kind
    """Turn a finding into what JSON can hold."""
    return dataclasses.asdict(finding)


def where(ranks: Iterable[int], places: dict[int, Place]) -> str:
    """Name ranks by their nodes: "n1", where all its ranks are meant, or "n1 (rank 0-3)"."""
    ranks = sorted(ranks)
    nodes: dict[str, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(places[rank].node, []).append(rank)
    everyone = dict.fromkeys(nodes, 0)
    for place in places.values():
        if place.node in everyone:
            everyone[place.node] += 1
    names = [
        node if len(own) == everyone[node] > 1 else f"{node} (rank {spans(own)})"
        for node, own in nodes.items()
    ]
    more = len(names) - _NODES_NAMED
    return ", ".join(names[:_NODES_NAMED]) + (f" and {more} more nodes" if more > 0 else "")


def spans(numbers: Iterable[int]) -> str:
    """Write sorted numbers as "0-3, 6"."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)


def count_of(number: int, noun: str) -> str:
    """Write "1 rank" or "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def worst(rows: Iterable[Row]) -> Verdict:
    """Return the verdict over all rows."""
    verdicts = {row.verdict for row in rows}
    if verdicts & {Verdict.FAIL, Verdict.SKIP}:
        return Verdict.FAIL
    return Verdict.WARN if Verdict.WARN in verdicts else Verdict.OK
