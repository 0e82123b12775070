"""What follows when a start of a run ended."""

import errno
import fcntl
import json
from dataclasses import fields
from pathlib import Path

import pytest

from launcher.errors import LaunchError
from launcher.supervise import (
    CURRENT,
    DONE,
    HISTORY,
    LOCK,
    REQUEUE,
    START_AGAIN,
    STOP_NOTE,
    RestartConfig,
    StartRecord,
    begin,
    end,
    main,
    newest_step,
    read_history,
)
from tsmoe import run_folder
from tsmoe.run_folder import EndOfStart

LIMITS = RestartConfig(most=10, most_without_progress=2)


def save(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def start(
    run: Path, *, restart: int, code: int, step: int | None = None, marker: str | None = None
) -> StartRecord:
    begin(run, job="7", restart=restart, limits=LIMITS)
    if step is not None:
        save(run, step)
    if marker is not None:
        (run / marker).unlink(missing_ok=True)
        (run / marker).write_text("x")
    return end(run, exit_code=code, nodes=["n1", "n2"], limits=LIMITS)


def test_run_that_is_done_is_not_started_again(tmp_path: Path) -> None:
    record = start(tmp_path, restart=0, code=0, step=30, marker="DONE")
    assert (record.outcome, record.decision, record.step) == ("done", "none", 30)
    assert not (tmp_path / CURRENT).exists()


def test_done_counts_though_the_launcher_reports_a_failure(tmp_path: Path) -> None:
    assert start(tmp_path, restart=0, code=1, step=30, marker="DONE").outcome == "done"


def test_marker_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    start(tmp_path, restart=0, code=0, step=30, marker="DONE")
    record = start(tmp_path, restart=1, code=1)
    assert record.outcome == "crashed"


def test_exit_code_0_without_a_marker_is_a_crash(tmp_path: Path) -> None:
    record = start(tmp_path, restart=0, code=0, step=30)
    assert (record.outcome, record.decision) == ("crashed", "restart")


def test_crash_with_progress_is_started_again(tmp_path: Path) -> None:
    record = start(tmp_path, restart=0, code=137, step=20)
    assert record.decision == "restart"
    assert "20 further" in record.reason
    assert "137" in record.reason


def test_starts_without_progress_end_at_the_limit(tmp_path: Path) -> None:
    decisions = [start(tmp_path, restart=n, code=1).decision for n in range(3)]
    assert decisions == ["restart", "restart", "give_up"]
    assert "most_without_progress" in read_history(tmp_path)[-1].reason


def test_progress_between_idle_starts_begins_the_count_anew(tmp_path: Path) -> None:
    start(tmp_path, restart=0, code=1)
    start(tmp_path, restart=1, code=1)
    start(tmp_path, restart=2, code=1, step=5)
    assert start(tmp_path, restart=3, code=1).decision == "restart"


def test_a_launch_by_hand_begins_the_count_anew(tmp_path: Path) -> None:
    for number in range(3):
        start(tmp_path, restart=number, code=1)
    assert start(tmp_path, restart=0, code=1).decision == "restart"


def test_stop_in_a_time_slice_that_is_too_short_ends_too(tmp_path: Path) -> None:
    decisions = [start(tmp_path, restart=n, code=0, marker="REQUEUE").decision for n in range(3)]
    assert decisions[-1] == "give_up"


def test_mistake_is_not_repeated_at_the_first_start_alone(tmp_path: Path) -> None:
    assert start(tmp_path, restart=0, code=2).decision == "give_up"
    # Later the same command was right once; ranks of a lost node may hold the run for a while.
    assert start(tmp_path, restart=1, code=2).decision == "restart"


def test_bad_data_after_progress_is_tried_again(tmp_path: Path) -> None:
    # Such as a worker that waited for its store in vain, hours after the first start.
    assert start(tmp_path, restart=0, code=3, step=20).decision == "restart"


def test_restarts_in_all_have_a_limit(tmp_path: Path) -> None:
    for number in range(10):
        assert start(tmp_path, restart=number, code=1, step=number + 1).decision == "restart"
    record = start(tmp_path, restart=10, code=1, step=11)
    assert record.decision == "give_up"
    assert "restarts.most" in record.reason


def test_start_that_nobody_ended_is_recorded_by_the_next(tmp_path: Path) -> None:
    begin(tmp_path, job="7", restart=0, limits=LIMITS)
    save(tmp_path, 8)
    begin(tmp_path, job="7", restart=1, limits=LIMITS)
    (lost,) = read_history(tmp_path)
    assert (lost.exit_code, lost.outcome, lost.step) == (None, "crashed", 8)
    assert "lost" in lost.reason


def test_start_that_nobody_ended_is_recorded_by_a_launch_by_hand(tmp_path: Path) -> None:
    begin(tmp_path, job="7", restart=0, limits=LIMITS)
    save(tmp_path, 8)
    begin(tmp_path, job="8", restart=0, limits=LIMITS)
    (lost,) = read_history(tmp_path)
    assert (lost.job, lost.outcome, lost.decision, lost.step) == ("7", "crashed", "none", 8)
    assert "by hand" in lost.reason
    assert json.loads((tmp_path / CURRENT).read_text())["job"] == "8"


def test_names_in_a_run_folder_are_those_of_the_program() -> None:
    # Neither may import the other.
    assert (DONE, REQUEUE) == (run_folder.DONE_MARKER, run_folder.REQUEUE_MARKER)
    assert (LOCK, HISTORY) == (run_folder.LOCK_FILE, run_folder.RESTARTS_FILE)
    assert STOP_NOTE == run_folder.STOP_NOTE
    ours, theirs = ([f.name for f in fields(kind)] for kind in (StartRecord, EndOfStart))
    assert ours == theirs


def test_job_that_the_queue_starts_in_vain_again_and_again_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        begin(tmp_path, job="7", restart=number, limits=LIMITS)
    with pytest.raises(LaunchError, match="3 starts"):
        begin(tmp_path, job="7", restart=3, limits=LIMITS)


def test_history_survives_a_line_cut_short(tmp_path: Path) -> None:
    start(tmp_path, restart=0, code=1, step=1)
    with (tmp_path / HISTORY).open("a") as stream:
        stream.write('{"time": "20')
    assert len(read_history(tmp_path)) == 1


def test_newest_step_looks_at_whole_names_alone(tmp_path: Path) -> None:
    for name in ("step_00000003", ".incomplete-step_00000009", "step_00000005.copy"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 3


def test_batch_script_hears_75_as_long_as_it_pays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def once(restart: int, step: int | None) -> int:
        queue = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": str(restart)}
        words = ["--run", str(tmp_path), "--most", "3", "--most-without-progress", "0"]
        assert main(["begin", *words], queue) == 0
        if step is not None:
            save(tmp_path, step)
        return main(["end", *words, "--code", "9", "--nodes", "a,b"], queue)

    assert once(0, 4) == START_AGAIN
    assert once(1, None) == 9
    assert "give_up" in capsys.readouterr().err
    lines = (tmp_path / HISTORY).read_text().splitlines()
    assert json.loads(lines[0])["nodes"] == ["a", "b"]
    assert json.loads(lines[0])["job"] == "12"


@pytest.mark.parametrize(("text", "decision"), [("", "none"), ("requeue\n", "restart")])
def test_note_ends_a_run_for_good_unless_it_says_requeue(
    tmp_path: Path, text: str, decision: str
) -> None:
    begin(tmp_path, job="7", restart=0, limits=LIMITS)
    save(tmp_path, 4)
    (tmp_path / "REQUEUE").write_text("4")
    (tmp_path / STOP_NOTE).write_text(text)
    assert end(tmp_path, exit_code=0, limits=LIMITS).decision == decision
    begin(tmp_path, job="7", restart=0 if decision == "none" else 1, limits=LIMITS)
    assert not (tmp_path / STOP_NOTE).exists()


def test_note_ends_a_run_that_waits_in_the_queue_or_crashes(tmp_path: Path) -> None:
    assert start(tmp_path, restart=0, code=1, step=4).decision == "restart"
    (tmp_path / STOP_NOTE).touch()
    with pytest.raises(LaunchError, match="the note STOP is there"):
        begin(tmp_path, job="7", restart=1, limits=LIMITS)
    begin(tmp_path, job="8", restart=0, limits=LIMITS)  # launched again by hand
    save(tmp_path, 5)
    (tmp_path / STOP_NOTE).touch()
    record = end(tmp_path, exit_code=1, limits=LIMITS)
    assert (record.outcome, record.decision) == ("crashed", "none")


def test_run_that_goes_on_already_is_not_launched_again(tmp_path: Path) -> None:
    begin(tmp_path, job="7", restart=0, limits=LIMITS)
    with (tmp_path / ".lock").open("w") as rank:
        fcntl.flock(rank, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match=r"a process is training there.*STOP"):
            begin(tmp_path, job="8", restart=0, limits=LIMITS)
        assert json.loads((tmp_path / CURRENT).read_text())["job"] == "7"
        begin(tmp_path, job="7", restart=1, limits=LIMITS)  # what lingers of the start before
    begin(tmp_path, job="8", restart=0, limits=LIMITS)


def test_cancelled_job_is_not_started_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, job="7", restart=0, limits=RestartConfig())
    save(run, 5)
    words = ["end", "--run", str(run), "--code", "0", "--cancelled"]
    assert main(words) == 1
    (record,) = read_history(run)
    assert (record.decision, record.reason) == (
        "none",
        "crashed at step 5, and its job was cancelled",
    )


def test_verdict_holds_though_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    begin(run, job="7", restart=0, limits=RestartConfig())
    save(run, 5)
    usual = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(
            Path,
            "open",
            lambda p, mode="r", *a, **k: (_is_full if mode == "a" else usual)(p, mode, *a, **k),
        )
        assert main(["end", "--run", str(run), "--code", "1"]) == 75
    assert "restarts.jsonl: No space left on device; crashed" in capsys.readouterr().err
    monkeypatch.setattr(Path, "write_text", _is_full)
    with pytest.raises(LaunchError, match=r"start\.json: cannot be written \(No space left"):
        begin(run, job="7", restart=1, limits=RestartConfig())


def test_file_system_without_locks_is_no_running_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    begin(tmp_path / "run", job=None, restart=0, limits=RestartConfig())


def test_lock_that_cannot_be_looked_at_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(LaunchError, match=r"\.lock: cannot be locked \(Input/output error\)"):
        begin(tmp_path / "run", job=None, restart=0, limits=RestartConfig())
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"\.lock: cannot be opened \(Is a directory\)"):
        begin(tmp_path / "other", job=None, restart=0, limits=RestartConfig())


def _is_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
