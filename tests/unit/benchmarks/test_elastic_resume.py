"""Which switches between ways to run are tried, and how they are started."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("elastic_resume", "small_runs", "runs", "record"):
        sys.modules.pop(name, None)


def test_all_chains_have_every_pair_of_ways() -> None:
    from elastic_resume import ONE, TWO, all_chains

    chains = all_chains()
    assert {(a, b) for a, b, _ in chains} == {(a, b) for a in TWO for b in ONE}
    assert {(b, c) for _, b, c in chains} == {(b, c) for b in ONE for c in TWO}


def test_chosen_chains_have_each_way_in_each_place_and_come_back_to_another() -> None:
    from elastic_resume import ONE, TWO, chosen_chains

    chains = chosen_chains()
    assert [set(place) for place in zip(*chains, strict=True)] == [set(TWO), set(ONE), set(TWO)]
    assert all(first != last for first, _, last in chains)


def test_ways_are_settings_of_the_command_with_equal_windows() -> None:
    from elastic_resume import Way
    from small_runs import small_settings

    command = Way(2, 3, 2).command(["a=1"])
    assert {"engine.zero_stage=3", "engine.expert_parallel_size=2", "a=1"} <= set(command)
    assert "deepspeed.launcher.launch" in command
    assert "engine.type=plain" in Way(1).command([])
    one, two = (small_settings(Path("c"), steps=3, ranks=ranks) for ranks in (1, 2))
    assert set(one) ^ set(two) == {
        "training.micro_batch_size=16", "training.micro_batch_size=8"
    }  # fmt: skip
