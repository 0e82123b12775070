"""Ranks that fail must fail their test, at once and with the reason."""

import os
import time

import pytest

from rank_pool import RankError, run_on_ranks
from tsmoe import ranks as ranks_module


def gather_numbers(offset: int) -> list[int]:
    ranks = ranks_module.start()
    return ranks.gather(offset + ranks.rank)


def fail_on_rank_1(way: str) -> None:
    ranks = ranks_module.start()
    if ranks.rank == 1:
        if way == "raises":
            raise ValueError("this is why")
        if way == "dies":
            os._exit(3)
        time.sleep(60)
    ranks.barrier()


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_on_ranks(gather_numbers, 5, num_ranks=2) == [[5, 6], [5, 6]]
    assert run_on_ranks(gather_numbers, 7, num_ranks=1) == [[7]]


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("raises", r"rank 1(.|\n)*fail_on_rank_1(.|\n)*this is why"),
        ("dies", "died without a word|Connection"),
        ("hangs", r"did not end in time(.|\n)*in fail_on_rank_1"),
    ],
)
def test_failure_of_one_rank_ends_all_and_is_shown(way: str, words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(RankError, match=words):
        run_on_ranks(fail_on_rank_1, way, time_limit=5)
    assert time.monotonic() - begun < 20
    assert run_on_ranks(gather_numbers, 0) == [[0, 1], [0, 1]]
