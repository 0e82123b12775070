"""Waiting for a job of a queue that does not always answer."""

from pathlib import Path

import pytest

from launcher import preflight
from launcher.errors import LaunchError

STATES = """#!/bin/sh
echo >> {folder}/asked
case $(wc -l < {folder}/asked) in
    1) echo "PENDING Resources" ;;
    2) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;;
    3) echo "RUNNING None" ;;
    *) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;
esac
"""


def queue(folder: Path, monkeypatch: pytest.MonkeyPatch, squeue: str) -> None:
    """Put commands of a queue first in PATH."""
    for name, text in (
        ("squeue", squeue),
        ("scontrol", "#!/bin/sh\necho JobState=FAILED ExitCode=3:0\n"),
    ):
        (folder / name).write_text(text.replace("{folder}", str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(preflight, "_SECONDS_BETWEEN_LOOKS", 0.0)


def test_queue_that_fails_to_answer_once_is_not_the_end_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch, STATES)
    told: list[str] = []
    result = preflight.wait_for("7", tmp_path / "log", tell=told.append)
    assert told == ["job 7: PENDING Resources", "job 7: RUNNING None"]
    assert (result.state, result.exit_code) == ("FAILED", 3)


def test_queue_that_answers_no_more_ends_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(tmp_path, monkeypatch, "#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(preflight, "_MOST_UNANSWERED", 3)
    with pytest.raises(LaunchError, match="does not answer any more; job 7 may go on"):
        preflight.wait_for("7", tmp_path / "log", tell=print)
