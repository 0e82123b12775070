"""Stalls of checkpoints as shares of a step."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("save_cost", "step_speed", "step_turns", "step_variants", "runs", "record"):
        sys.modules.pop(name, None)


def test_stalls_are_shares_of_a_step_without_a_checkpoint() -> None:
    from save_cost import Times, summary

    times = {
        "background": Times(copied=[9.0, 0.1, 0.1], stalled=[9.0, 0.2, 0.4],
                            visible_after=[9.0, 1.0, 1.0]),
        "synchronous": Times(copied=[9.0, 0.1, 0.1], stalled=[9.0, 2.0, 2.0],
                             visible_after=[9.0, 2.0, 2.0]),
    }  # fmt: skip
    wall = {"none": [4.0, 8.0], "background": [4.4, 8.8], "synchronous": [6.0, 10.0]}
    found = summary(times, wall, steps=2, warm_up=1)
    assert found["step_seconds"] == 3.0
    assert found["background"]["stall_seconds"] == pytest.approx(0.3)
    assert found["background"]["stall_over_step"] == pytest.approx(0.1)
    assert found["background"]["longest_stall_seconds"] == 0.4
    assert found["background"]["copy_over_step"] == pytest.approx(0.1 / 3, abs=1e-3)
    # A tenth more time for two steps is a fifth of a step.
    assert found["background"]["steps_lost_in_all"] == pytest.approx(0.2)
    assert found["synchronous"]["stall_over_step"] == pytest.approx(2 / 3, abs=1e-3)
