"""The predicted times of collectives, against sums done by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from collective_cost import ALL_GATHER, ALL_REDUCE, EXCHANGE, KINDS, Link, Network, predict
from fake_ranks import Collective

NETWORK = Network(
    ranks_per_node=8,
    inside=dict.fromkeys(KINDS, Link(latency_seconds=1.0, bytes_per_second=100.0)),
    between=dict.fromkeys(KINDS, Link(latency_seconds=2.0, bytes_per_second=10.0)),
)


def call(kind: str, members: range, num_bytes: int = 800, **rows) -> Collective:
    return Collective(kind=kind, members=tuple(members), shape=(), num_bytes=num_bytes, **rows)


@pytest.mark.parametrize(
    ("collective", "seconds"),
    [
        # 7/8 of the bytes leave a rank, twice; three steps of a tree there and back.
        (call(ALL_REDUCE, range(8)), 2 * 700 / 100 + 6 * 1.0),
        (call(ALL_GATHER, range(8)), 700 / 100 + 7 * 1.0),
        # One rank a node: each has a card of its own.
        (call(ALL_GATHER, range(0, 64, 8)), 700 / 10 + 7 * 2.0),
        # Two nodes of which four ranks each take part share four cards.
        (call(ALL_GATHER, range(4, 12)), 700 / 40 + 7 * 2.0),
        # A node's eight cards.
        (call(ALL_REDUCE, range(32)), 2 * 775 / 80 + 10 * 2.0),
        # 16 rows of 5 bytes, of which 7/8 leave; the rows of the trace do not count.
        (call(EXCHANGE, range(8), send=(1,) * 8, receive=(1,) * 8, row_bytes=5), 0.7 + 1.0),
        # Counts go to all in equal parts.
        (call(EXCHANGE, range(8), num_bytes=64), 0.56 + 1.0),
    ],
)
def test_a_collective_takes_its_bytes_and_its_steps(collective, seconds) -> None:
    found = predict([collective], NETWORK, rows=16)
    assert found[KINDS[collective.kind]] == pytest.approx(seconds)
    assert sum(found.values()) == pytest.approx(seconds)


def test_calls_add_up_and_a_rank_alone_sends_nothing() -> None:
    calls = [call(ALL_REDUCE, range(8)), call(ALL_REDUCE, range(8)), call(ALL_REDUCE, range(3, 4))]
    assert predict(calls, NETWORK, rows=1)["all_reduce"] == pytest.approx(40.0)


def test_a_collective_of_unknown_cost_is_refused() -> None:
    with pytest.raises(ValueError, match="broadcast_"):
        predict([call("broadcast_", range(8))], NETWORK, rows=1)
