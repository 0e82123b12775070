"""`tsmoe status`: what it says of runs in every state, and that it leaves them as they are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from status_run import (
    NOW,
    set_age,
    step_line,
    validation_line,
    write_checkpoint,
    write_ends,
)
from tsmoe.__main__ import main
from tsmoe.errors import DataError
from tsmoe.status import Health, look_at
from tsmoe.status.prometheus import prometheus_text
from tsmoe.status.table import duration, table
from tsmoe.status.tail import STEPS_READ, read_tail

MakeRun = Callable[..., Path]


def iso(age: float) -> str:
    return datetime.fromtimestamp(NOW - age, UTC).isoformat()


def test_numbers_are_those_of_the_newest_lines(make_run: MakeRun) -> None:
    run = make_run()
    write_checkpoint(run, 10, age=900)
    write_checkpoint(run, 20, age=300)
    write_ends(run, {"reason": "node n1 was lost"}, {"decision": "none", "time": iso(6000)})
    status = look_at(run, now=NOW)
    assert (status.step, status.steps_planned, status.ranks) == (30, 100, 2)
    assert status.loss == pytest.approx(10 / 30)
    assert (status.validation_loss, status.validation_step) == (0.5, 20)
    assert (status.points_per_second, status.step_seconds) == (500, 2)
    # 70 steps of 2 s, and 10 s of validation every 20 steps.
    assert status.eta_seconds == pytest.approx(70 * (2 + 10 / 20))
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.damage) == (20, None)
    assert status.checkpoint.saved_at == NOW - 300
    assert status.restarts == 1
    assert status.health is Health.RUNNING


def test_first_step_of_a_start_is_no_measure_of_speed(make_run: MakeRun) -> None:
    first = step_line(0, seconds=90.0, points=1.0) | {"speed/start": {"ranks": 4}}
    run = make_run(lines=[first])
    assert look_at(run, now=NOW).step_seconds == 90
    run = make_run("later", lines=[first, step_line(1), step_line(2, points=700.0)])
    status = look_at(run, now=NOW)
    assert (status.step_seconds, status.points_per_second, status.ranks) == (2, 600, 2)


@pytest.mark.parametrize(("marker", "health"), [("DONE", "done"), ("REQUEUE", "stopped")])
def test_marker_tells_how_a_run_ended(make_run: MakeRun, marker: str, health: str) -> None:
    run = make_run(silent=90_000)
    (run / marker).write_text("30\n")
    set_age(run / marker, 90_000)
    set_age(run / ".lock", 95_000)
    assert look_at(run, now=NOW).health.value == health
    # A copy is as new as it is.
    for name in (".lock", "config.yaml", "metrics.jsonl", marker):
        set_age(run / name, 3.0 if name == ".lock" else 4.0)
    assert look_at(run, now=NOW).health.value == health
    for name in ("config.yaml", "metrics.jsonl", marker):
        set_age(run / name, 90_000)
    # Started again: the marker stays until the data are open.
    set_age(run / ".lock", 60)
    assert look_at(run, now=NOW).health is Health.RUNNING


def test_silence_longer_than_steps_and_validation_take_is_a_stall(make_run: MakeRun) -> None:
    run = make_run()
    slow = make_run(
        "slow", lines=[*(step_line(i, seconds=60.0) for i in range(9)), validation_line(8)]
    )
    validating = make_run(
        "validating", lines=[*map(step_line, range(9)), validation_line(8, seconds=400.0)]
    )
    for silent, healths in (
        (100, "running running running"),
        (130, "stalled running running"),
        (620, "stalled running running"),
        (640, "stalled stalled running"),
        (1300, "stalled stalled stalled"),
    ):
        for folder in (run, slow, validating):
            set_age(folder / "metrics.jsonl", silent)
        found = " ".join(look_at(f, now=NOW).health.value for f in (run, slow, validating))
        assert found == healths, silent


def test_checkpoint_that_is_being_written_is_a_sign_of_life(make_run: MakeRun) -> None:
    run = make_run(silent=1000)
    write_checkpoint(run, 20, age=1000)
    assert look_at(run, now=NOW).health is Health.STALLED
    part = run / "checkpoints" / ".incomplete-step_00000030" / "dense.safetensors"
    part.parent.mkdir()
    part.write_bytes(b"")
    set_age(run / "checkpoints", 1000)
    set_age(part, 20)
    assert look_at(run, now=NOW).health is Health.RUNNING


@pytest.mark.parametrize(
    ("end", "health", "remark"),
    [
        ({"decision": "give_up", "reason": "no progress twice"}, "failed", "no progress twice"),
        ({"decision": "none", "reason": "killed"}, "failed", "killed"),
        ({"decision": "restart"}, "stopped", "waits to be started again: rank 1 was killed"),
        ({"decision": "restart", "outcome": "stopped"}, "stopped", "waits to be started again"),
    ],
)
def test_end_that_the_launcher_wrote_tells_what_follows(
    make_run: MakeRun, end: dict, health: str, remark: str
) -> None:
    run = make_run(silent=30)
    write_ends(run, end | {"time": iso(20)})
    status = look_at(run, now=NOW)
    assert status.health.value == health
    assert remark in status.remark
    # A later start makes it history.
    set_age(run / ".lock", 10)
    assert look_at(run, now=NOW).health is Health.RUNNING


@pytest.mark.parametrize("ago", [60.0, 3600.0])
def test_marker_of_an_earlier_start_does_not_hide_that_the_newest_failed(
    make_run: MakeRun, ago: float
) -> None:
    run = make_run(silent=9000.0, started=ago + 20)
    (run / "REQUEUE").write_text("30")
    set_age(run / "REQUEUE", 8990)
    write_ends(run, {"time": iso(ago), "decision": "give_up", "reason": "exit code 3"})
    assert look_at(run, now=NOW).health is Health.FAILED


def test_run_before_its_first_step(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(lines=[], silent=30, started=40)
    status = look_at(run, now=NOW)
    assert (status.health, status.step, status.eta_seconds) == (Health.RUNNING, 0, None)
    for name in (".lock", "config.yaml", "metrics.jsonl"):
        set_age(run / name, 3600)
    assert look_at(run, now=NOW).health is Health.STALLED
    queued = tmp_path / "queued"
    queued.mkdir()
    (queued / "restarts.jsonl").write_text("")
    assert look_at(queued, now=NOW).health is Health.NOT_STARTED


def test_checkpoint_whose_file_is_short_is_told(make_run: MakeRun) -> None:
    run = make_run()
    write_checkpoint(run, 20, age=300, cut=True)
    status = look_at(run, now=NOW)
    assert status.checkpoint is not None
    assert status.checkpoint.damage == "dense.safetensors has 50 bytes instead of 100"
    assert "checkpoint of step 20 is not whole: dense.safetensors has 50" in table([status])
    (run / "checkpoints" / "step_00000020" / "meta.json").write_text("{")
    assert "meta.json cannot be read" in table([look_at(run, now=NOW)])


def test_what_a_run_passed_over_is_told(make_run: MakeRun) -> None:
    run = make_run()
    meta = write_checkpoint(run, 20, age=300) / "meta.json"
    event = {"step": 7, "what": "loss", "series": ["a"], "action": "skip", "windows": [0, 8]}
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"not_finite": [event, event]}))
    (run / "quarantine.json").write_text(json.dumps({"shards": [{"file": "part-00001.arrow"}]}))
    (status,) = [look_at(run, now=NOW)]
    assert "2 step(s) were not finite" in table([status])
    assert "without 1 bad shard(s)" in table([status])
    assert 'tsmoe_bad_steps_total{run="' in prometheus_text([status])
    (run / "quarantine.json").write_text("{")
    assert look_at(run, now=NOW).lost_shards == 0


def test_lines_that_cannot_be_read_are_passed_over(make_run: MakeRun) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"loss/train": 1}\n{"step": 30, "loss/tr')
    (run / "config.yaml").write_text("training: [")
    (run / "restarts.jsonl").write_text('{"time": "x"}\n{"ti')
    status = look_at(run, now=NOW)
    assert (status.step, status.steps_planned, status.restarts) == (30, None, 0)


def test_of_a_long_file_only_the_tail_is_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps(step_line(0)).encode()
    with path.open("wb") as file:
        for step in range(30_000):
            file.write(line.replace(b'"step": 0', b'"step": %d' % step) + b"\n")
            if step == 29_000:
                file.write(json.dumps(validation_line(step)).encode() + b"\n")
    read = []
    monkeypatch.setattr(
        "tsmoe.status.tail.json.loads",
        lambda t: read.append(t) or json.JSONDecoder().decode(t.decode()),
    )
    tail = read_tail(path)
    assert (tail.done, len(tail.steps)) == (30_000, STEPS_READ)
    assert tail.validation is not None
    assert tail.validation["step"] == 29_000
    assert len(read) == STEPS_READ + 1


@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_tail_is_the_same_however_it_is_cut(tmp_path: Path, monkeypatch, block: int) -> None:
    monkeypatch.setattr("tsmoe.status.tail._BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    lines = [validation_line(1), *(step_line(step) for step in range(3))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tail = read_tail(path)
    assert [line["step"] for line in tail.steps] == [2, 1, 0]
    assert tail.validation == lines[0]


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def test_command_prints_one_table_and_writes_nothing_into_runs(
    make_run: MakeRun, tmp_path: Path, capsys
) -> None:
    first, second = make_run("first"), make_run("second", steps=7)
    write_checkpoint(first, 20, age=300)
    before = content(tmp_path)
    assert main(["status", str(first), str(second)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "health", "step", "left", "points/s", "loss", "validation",
                                "checkpoint", "restarts", "ranks"]  # fmt: skip
    assert "30 of 100" in lines[1]
    assert "7 of 100" in lines[2]
    assert content(tmp_path) == before


def test_other_folder_exits_with_3_and_the_others_are_shown(
    make_run: MakeRun, tmp_path: Path, capsys
) -> None:
    run, other = make_run(), tmp_path / "other"
    other.mkdir()
    assert main(["status", str(run), str(other), "--json"]) == 3
    told = capsys.readouterr()
    assert f"{other}: is no folder of a run" in told.err
    assert told.err.count("\n") == 1
    values = json.loads(told.out)["runs"]
    assert [value["run"] for value in values] == [str(run)]
    assert values[0]["steps_planned"] == 100
    with pytest.raises(DataError, match="not there"):
        look_at(tmp_path / "none")


def test_run_that_may_not_be_read_does_not_hide_the_others(
    make_run: MakeRun, tmp_path: Path, capsys
) -> None:
    run, closed = make_run(), tmp_path / "closed"
    (closed / "metrics.jsonl").mkdir(parents=True)  # root may read whatever is a file
    assert main(["status", str(closed), str(run)]) == 3
    told = capsys.readouterr()
    assert str(run) in told.out
    assert f"{closed}: cannot be looked at ([Errno 21]" in told.err


def test_watch_prints_until_all_runs_are_done(make_run: MakeRun, capsys, monkeypatch) -> None:
    run = make_run()
    naps = []

    def end_run(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 2:
            (run / "DONE").write_text("100\n")

    monkeypatch.setattr("time.sleep", end_run)
    assert main(["status", str(run), "--watch", "5", "--json"]) == 0
    states = [
        json.loads(line)["runs"][0]["health"] for line in capsys.readouterr().out.split("\n")[:-1]
    ]
    assert naps == [5, 5]
    assert states[-1] == "done"
    assert len(states) == 3


def test_interval_of_nothing_exits_with_2(make_run: MakeRun, capsys) -> None:
    assert main(["status", str(make_run()), "--watch", "0"]) == 2
    assert "--watch 0 must be at least 0.1" in capsys.readouterr().err


def test_command_does_without_torch(make_run: MakeRun) -> None:
    program = (
        "import sys; from tsmoe.__main__ import main; code = main(sys.argv[1:]);"
        "print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules]); sys.exit(code)"
    )
    run = make_run()
    write_checkpoint(run, 20, age=300)
    command = [sys.executable, "-c", program, "status", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "[]"


def test_durations_are_written_in_two_units() -> None:
    spans = (0, 59.6, 61, 3_660, 200_000)
    assert list(map(duration, spans)) == [
        "0 s",
        "1 min 00 s",
        "1 min 01 s",
        "1 h 01 min",
        "2 d 07 h",
    ]
