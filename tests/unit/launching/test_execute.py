"""What `tsmoe launch` makes of a start on this machine."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.execute import run_all
from launcher.plan import Job, PlannedStart
from launcher.supervise import RestartConfig
from tsmoe.__main__ import main

LIMITS = RestartConfig(most=2)


def start_of(script: str, run: Path) -> PlannedStart:
    command = ("pretrain", "time_tracker_tiny")
    job = Job(name="a", command=command, run=str(run), node_counts=(1,), ranks_per_node=1)
    return PlannedStart(job=job, argv=("sh", "-c", script), folder=run.parent)


def decisions_of(run: Path) -> list[str]:
    lines = (run / "restarts.jsonl").read_text().splitlines()
    return [json.loads(line)["decision"] for line in lines]


def test_mistake_that_a_rank_tells_of_is_not_repeated_though_its_launcher_says_1(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    start = start_of('echo 3 > "$TSMOE_EXIT_CODE_FILE"; exit 1', run)
    assert run_all([start], LIMITS) == 3
    assert decisions_of(run) == ["give_up"]


@pytest.mark.parametrize("script", ["exit 1", ': > "$TSMOE_EXIT_CODE_FILE"; exit 1'])
def test_failure_that_no_rank_tells_of_is_started_again(tmp_path: Path, script: str) -> None:
    run = tmp_path / "run"
    assert run_all([start_of(script, run)], LIMITS) == 1
    assert decisions_of(run) == ["restart", "restart", "give_up"]


def test_machines_of_a_start_stand_in_its_record(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = replace(start_of("exit 1", run), hosts=("n1", "n2"))
    assert run_all([start], RestartConfig(most=0)) == 1
    assert json.loads((run / "restarts.jsonl").read_text())["nodes"] == ["n1", "n2"]


def test_first_rank_that_fails_leaves_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "exit_code"
    monkeypatch.setenv("TSMOE_EXIT_CODE_FILE", str(told))
    assert main(["status", str(tmp_path)]) == 3  # no run is there
    assert main(["status", str(tmp_path), "--watch", "0"]) == 2
    assert told.read_text() == "3"
