"""A two-rank run whose ranks and launcher are killed comes through as if nothing had happened.

A short version of benchmarks/rank_kills.py, whose results hold a hundred kills.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
MODULES = ("rank_kills", "kill_counts", "watched_run", "small_runs", "runs", "record")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.launch
def test_killed_run_ends_at_once_and_comes_through_unchanged(tmp_path, monkeypatch) -> None:
    import rank_kills

    # One kill in a save, then the launcher alone while steps are done.
    phases, victims = iter(["save", "step"]), iter([{"rank 1": 1.0}, {"launcher": 1.0}])

    def next_phase(kills: list, generator: random.Random) -> str:
        monkeypatch.setattr(rank_kills, "VICTIMS", next(victims, {"all": 1.0}))
        return next(phases, "step")

    monkeypatch.setattr(rank_kills, "choose_phase", next_phase)
    # At once: a save this small may be over before a moment in it that is drawn later.
    monkeypatch.setattr(rank_kills, "_DELAY_SECONDS", dict.fromkeys(rank_kills._DELAY_SECONDS, 0))
    campaign = rank_kills.Campaign(tmp_path, seed=0)
    campaign.go_on(2)
    in_save, of_launcher = campaign.kills
    assert (in_save.wanted, in_save.killed) == ("save", ["rank 1"])
    assert of_launcher.killed == ["launcher"]
    # Ranks without a launcher save and stop: they do not train on to the end of the run.
    assert of_launcher.newest_whole == of_launcher.reached < rank_kills.STEPS
    found = campaign.figures()
    assert found["orphans"] == 0
    assert found["visible_checkpoints_that_were_damaged"] == 0
    assert found["starts_that_failed_by_themselves"] == 0
    assert found["restarts_that_did_steps"] == 2
    assert found["restarts_not_from_the_newest_whole_checkpoint"] == 0
    assert (found["runs_completed"], found["runs_lost"]) == (1, 0)
    assert found["largest_loss_difference"] == 0
    assert found["runs_with_equal_records"] == found["runs_with_equal_last_checkpoint"] == 1
