"""`tsmoe launch` on this machine: ranks that die are started again, a stop is obeyed."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from launched_run import STEPS, launch_words, losses_of, newest, ranks_in, restarts_of, wait_until

pytestmark = pytest.mark.launch
TWO_RANKS = {"ranks_per_node": 2, "threads_per_rank": 1}


def test_killed_rank_and_stop_leave_the_losses_as_they_are(
    work: Path, undisturbed: list[float]
) -> None:
    run = work / "disturbed"
    words = launch_words(work, TWO_RANKS, f"run={run.name}")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: newest(run) >= 5, what="a checkpoint")
        os.kill(ranks_in(run)[-1], signal.SIGKILL)
        wait_until(lambda: (run / "restarts.jsonl").exists(), what="the restart")
        (crashed,) = restarts_of(run)
        assert (crashed["outcome"], crashed["decision"]) == ("crashed", "restart")
        wait_until(lambda: newest(run) > crashed["step"], what="progress after the restart")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, log[-3000:]
    assert (run / "REQUEUE").exists()
    stopped = restarts_of(run)[-1]
    assert stopped["outcome"] == "stopped"
    assert crashed["step"] < stopped["step"] < STEPS
    assert not ranks_in(run)

    again = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr[-3000:]
    assert losses_of(run) == undisturbed
    assert (run / "DONE").read_text().strip() == str(STEPS)
