"""Predict what the collectives of a traced step take on a network of given latency and bandwidth.

The alpha-beta model: a collective of n ranks costs its steps times a latency and the bytes that a
rank sends to others over a bandwidth. Nothing overlaps unless it is said so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fake_ranks import Collective

ALL_REDUCE, ALL_GATHER, EXCHANGE = "allreduce_", "_allgather_base_", "alltoall_base_"
KINDS = {ALL_REDUCE: "all_reduce", ALL_GATHER: "all_gather", EXCHANGE: "all_to_all"}


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one rank sends to others in a collective."""

    latency_seconds: float
    """Of one step of the algorithm."""
    bytes_per_second: float
    """Reached, one direction, of one rank."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links inside a node and between nodes, by kind of collective."""

    ranks_per_node: int
    inside: Mapping[str, Link]
    between: Mapping[str, Link]

    def link(self, call: Collective) -> Link:
        """The link that a collective is bound by.

        A ring that passes through several ranks of a node leaves it once, so that the node's
        network cards share what crosses nodes; no faster than the links inside.
        """
        nodes = {member // self.ranks_per_node for member in call.members}
        inside, between = self.inside[call.kind], self.between[call.kind]
        if len(nodes) == 1:
            return inside
        if call.kind == EXCHANGE:
            return between
        shared = between.bytes_per_second * len(call.members) / len(nodes)
        return replace(between, bytes_per_second=min(shared, inside.bytes_per_second))


def bytes_out(call: Collective, *, rows: int) -> float:
    """Bytes that a rank sends to others, where experts are used alike and rings are used.

    Args:
        call: of a trace.
        rows: (window, token, expert) rows of a rank's micro-batch; the trace may be of fewer.
    """
    others = (len(call.members) - 1) / len(call.members)
    if call.kind == EXCHANGE and call.send:
        return rows * call.row_bytes * others
    return call.num_bytes * others * (2 if call.kind == ALL_REDUCE else 1)


def steps(call: Collective) -> int:
    """Messages that follow one another.

    A tree there and back to reduce, a ring to gather; in an exchange all are on their way at once.
    """
    count = len(call.members)
    if call.kind == EXCHANGE:
        return 1
    return 2 * math.ceil(math.log2(count)) if call.kind == ALL_REDUCE else count - 1


def predict(calls: Iterable[Collective], network: Network, *, rows: int) -> dict[str, float]:
    """Seconds of each kind of collective, all calls of a step together."""
    seconds = dict.fromkeys(KINDS.values(), 0.0)
    for call in calls:
        if len(call.members) == 1:
            continue
        if call.kind not in KINDS:
            raise ValueError(f"a step calls {call.kind}, which no cost is known of")
        link = network.link(call)
        wire = bytes_out(call, rows=rows) / link.bytes_per_second
        seconds[KINDS[call.kind]] += wire + steps(call) * link.latency_seconds
    return seconds
