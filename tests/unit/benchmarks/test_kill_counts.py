"""What the benchmark of killed ranks sees in a run folder, and how it counts."""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[3] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("kill_counts", "watched_run", "small_runs", "runs", "record"):
        sys.modules.pop(name, None)


def kill(**values):
    from kill_counts import Kill

    usual = {
        "run": 0, "first_step": 0, "seconds_to_first_step": 9.0, "reached": 0, "wanted": "step",
        "phase": "step", "killed": ["rank 0"], "after_seconds": 10.0, "steps_after": 0,
        "seconds_to_end": 1.0, "orphans": 0, "newest_whole": 0, "damaged": [],
    }  # fmt: skip
    return Kill(**usual | values)


def completion(**values):
    from kill_counts import Completion

    usual = {
        "run": 0, "first_step": 0, "seconds_to_first_step": 9.0, "reached": 60, "is_lost": False,
        "loss_difference": 0.0, "has_equal_record": True, "has_equal_checkpoint": True,
    }  # fmt: skip
    return Completion(**usual | values)


def test_steps_between_checkpoint_and_kill_count_as_redone() -> None:
    from kill_counts import restarts

    starts = [
        kill(reached=17, newest_whole=10),
        # Killed before its first step, after it had cut the record back to the checkpoint.
        kill(first_step=None, reached=10, newest_whole=10, phase="load"),
        kill(first_step=10, reached=21, newest_whole=20),
        completion(first_step=20),
    ]
    assert restarts(starts) == [
        {"first_step": 10, "newest_whole": 10, "redone": 7},
        {"first_step": 20, "newest_whole": 20, "redone": 1},
    ]


def test_summary_finds_what_must_not_be() -> None:
    from kill_counts import summary

    kills = [
        kill(reached=27, newest_whole=20, damaged=[10], orphans=1, steps_after=3),
        kill(run=1, reached=30, newest_whole=30, killed=["launcher"], seconds_to_end=4.0),
    ]
    completions = [
        completion(first_step=10, loss_difference=1e-3, has_equal_record=False),
        completion(run=1, first_step=30),
    ]
    found = summary(kills, completions, failures=2, save_every=10)
    assert found["restarts_not_from_the_newest_whole_checkpoint"] == 1
    assert found["most_steps_redone"] == 17
    assert found["restarts_by_steps_redone"] == {0: 1, 17: 1}
    assert found["visible_checkpoints_that_were_damaged"] == 1
    assert found["orphans"] == 1
    assert found["most_steps_done_after_a_kill"] == 3
    assert found["starts_that_failed_by_themselves"] == 2
    assert found["largest_loss_difference"] == 1e-3
    assert (found["runs_completed"], found["runs_with_equal_records"]) == (2, 1)
    assert found["seconds_until_all_ended"] == {"count": 2, "median": 2.5, "max": 4.0}
    assert found["by_victim"] == {"launcher": 1, "rank 0": 1}


def test_a_lost_run_is_counted_and_has_no_losses_to_compare() -> None:
    from kill_counts import summary

    lost = completion(
        is_lost=True, loss_difference=None, has_equal_record=False, has_equal_checkpoint=False
    )
    found = summary([kill()], [lost], failures=3, save_every=10)
    assert (found["runs_lost"], found["runs_completed"]) == (1, 0)
    assert found["largest_loss_difference"] is None


def test_a_checkpoint_with_other_bytes_is_damaged() -> None:
    from kill_counts import whole_checkpoints

    undisturbed = {10: {"a": "1"}, 20: {"a": "2"}, 30: {"a": "3"}}
    assert whole_checkpoints({}, undisturbed) == (0, [])
    assert whole_checkpoints({10: {"a": "1"}, 20: {"a": "2"}}, undisturbed) == (20, [])
    found = {10: {"a": "1"}, 20: {"a": "x"}, 30: None}
    assert whole_checkpoints(found, undisturbed) == (10, [20, 30])


def test_every_phase_gets_its_share() -> None:
    from kill_counts import PHASES, choose_phase

    kills = []
    for number in range(200):
        kills.append(kill(phase=choose_phase(kills, random.Random(number))))
    counts = Counter(found.phase for found in kills)
    assert counts.keys() == PHASES.keys()
    for phase, share in PHASES.items():
        assert counts[phase] == pytest.approx(200 * share, abs=4)


def test_watch_tells_steps_of_this_start_from_those_before(tmp_path) -> None:
    from watched_run import RunWatch

    path = tmp_path / "metrics.jsonl"
    before = [
        step_line(0, start=0.25), step_line(1), step_line(2), step_line(3, start=0.5)
    ]  # fmt: skip
    path.write_text("".join(before))
    watch = RunWatch(tmp_path, validate_every_steps=4)
    assert (watch.last_step, watch.phase()) == (3, "load")
    # What a start does: the record is cut back in another file that takes its place.
    (tmp_path / "new").write_text("".join(before[:3]))
    (tmp_path / "new").replace(path)
    assert (watch.phase(), watch.first_step, watch.last_step) == ("load", None, 2)
    with path.open("a") as file:
        file.write(step_line(3, start=0.75)[:-5])
        file.flush()
        assert watch.phase() == "load"  # not a whole line yet
        file.write(step_line(3, start=0.75)[-5:])
    assert watch.phase() == "evaluation"
    assert (watch.first_step, watch.last_step) == (3, 3)
    with path.open("a") as file:
        file.write(json.dumps({"step": 3, "loss/validation": 1.0}) + "\n")
    assert watch.phase() == "step"
    (tmp_path / "checkpoints" / ".incomplete-step_00000004").mkdir(parents=True)
    assert watch.phase() == "save"
    (tmp_path / "DONE").touch()
    assert watch.phase() == "exit"


def step_line(step: int, *, start: float | None = None) -> str:
    values = {"step": step, "loss/train": 1.0, "speed/step_seconds": start}
    return json.dumps(values | ({"speed/start": {"ranks": 2}} if start else {})) + "\n"


def test_loss_differences_are_those_of_equal_steps() -> None:
    from small_runs import largest_loss_difference

    ours = [{"step": step, "loss/train": 1.0 + step / 8} for step in range(4)]
    theirs = [{"step": step, "loss/train": 1.0} for step in range(4)]
    assert largest_loss_difference(ours, theirs, first=1, end=3) == 0.25
    validated = [*theirs, {"step": 2, "loss/validation": 1.0}]
    with pytest.raises(ValueError, match=r"\(2, 'loss/validation'\)"):
        largest_loss_difference(ours, validated, first=1, end=3)
