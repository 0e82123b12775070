"""`tsmoe launch` on a real SLURM cluster of two nodes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launched_run import (
    RANKS,
    STEPS,
    launch,
    losses_of,
    newest,
    ranks_in,
    restarts_of,
    wait_until,
)
from tsmoe.__main__ import main

pytestmark = pytest.mark.launch
TWO_NODES = {
    "name": "small",
    "nodes": 2,
    "ranks_per_node": 1,
    "threads_per_rank": 1,
    "backend": {"type": "slurm", "partition": "main", "time_limit": "20"},
}


def job_of(printed: str) -> str:
    return printed.split(" as job ")[1].split(";")[0]


def test_run_outlives_the_signal_a_killed_rank_and_a_requeue(
    cluster: Callable[..., str], work: Path, undisturbed: list[float]
) -> None:
    run = work / "queued"
    # Though one machine would do, it gets both.
    values = {**TWO_NODES, "backend": {**TWO_NODES["backend"], "least_nodes": 1}}
    job = job_of(launch(work, values, f"run={run.name}").stdout)
    log = work / "logs" / f"small-{job}.log"

    def count() -> int:
        return len(restarts_of(run)) if (run / "restarts.jsonl").exists() else 0

    try:
        # What SLURM sends before the time limit: to every process of the step.
        wait_until(lambda: newest(run) >= 5, what="a checkpoint")
        cluster("scancel", "--signal=USR1", job)
        wait_until(lambda: count() == 1, what="the end of the first start")
        (stopped,) = restarts_of(run)
        assert (stopped["outcome"], stopped["decision"]) == ("stopped", "restart"), stopped
        assert stopped["nodes"] == ["n1", "n2"]

        # A rank that dies: the job ends at once, and the script puts it back into the queue.
        wait_until(lambda: newest(run) > stopped["step"], what="progress after the signal")
        os.kill(ranks_in(run)[-1], signal.SIGKILL)
        wait_until(lambda: count() == 2, what="the end of the second start")
        crashed = restarts_of(run)[-1]
        assert (crashed["outcome"], crashed["decision"]) == ("crashed", "restart"), crashed

        # What the queue does by itself when a node is lost: the script gets no say.
        wait_until(lambda: newest(run) > crashed["step"], what="progress after the crash")
        cluster("scontrol", "requeue", job)
        wait_until(lambda: (run / "DONE").exists(), what="the end of the run")
        wait_until(lambda: not cluster("squeue", "-h", "-j", job).strip(), what="the job's end")
    except AssertionError:
        print(log.read_text()[-5000:])
        raise
    lost, done = restarts_of(run)[-2:]
    # SIGTERM comes first: with luck the ranks save and the script has its say, else nobody has.
    assert (lost["exit_code"], lost["outcome"]) in ((0, "stopped"), (None, "crashed")), lost
    assert (done["outcome"], done["step"]) == ("done", STEPS)
    assert "JobState=COMPLETED" in cluster("scontrol", "show", "job", job)
    assert losses_of(run) == undisturbed
    assert not ranks_in(run)
    assert "could not be requeued" not in log.read_text()


def test_cancelled_job_is_not_put_back_into_the_queue(
    cluster: Callable[..., str], work: Path
) -> None:
    run = work / "cancelled"
    job = job_of(launch(work, TWO_NODES, f"run={run.name}").stdout)
    wait_until(lambda: newest(run) >= 5, what="a checkpoint")
    cluster("scancel", job)
    wait_until(lambda: not cluster("squeue", "-h", "-j", job).strip(), what="the job's end")
    wait_until(lambda: not ranks_in(run), what="the end of the ranks")
    shown = cluster("scontrol", "show", "job", job)
    assert "JobState=CANCELLED" in shown
    assert "Restarts=0" in shown
    assert not (run / "DONE").exists()
    # The ranks may have had time to save, or not.
    if (run / "restarts.jsonl").exists():
        (end,) = restarts_of(run)
        assert (end["decision"], "cancelled" in end["reason"]) == ("none", True), end


def test_chain_builds_by_an_array_then_trains_then_exports(
    cluster: Callable[..., str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = {
        **TWO_NODES,
        "environment": RANKS,
        "folder": str(work),
        "name": "chain",
        "stages": [
            {
                "name": "build",
                "array": 2,
                "command": ["data", "build", "tiny", "--out", "built"],
            },
            {
                "name": "train",
                "after": ["build"],
                "command": [
                    "pretrain", "small.yaml", "run=chained", "corpus=built", "training.steps=4",
                ],
            },
            {
                "name": "export",
                "after": ["train"],
                "command": ["export", "chained", "chained/package"],
            },
        ],
    }  # fmt: skip
    path = work / "chain.yaml"
    path.write_text(yaml.safe_dump(chain))
    assert main(["launch", str(path)]) == 0
    printed = capsys.readouterr().out
    jobs = [
        line.split(" as job ")[1].split(";")[0]
        for line in printed.splitlines()
        if " as job " in line
    ]
    assert len(jobs) == 3
    last = jobs[-1]
    wait_until(
        lambda: not cluster("squeue", "-h", "-j", last).strip(), what="the chain", seconds=240
    )
    logs = "\n".join(path.read_text()[-2000:] for path in sorted((work / "logs").glob("chain-*")))
    assert (work / "chained" / "package" / "model.safetensors").exists(), logs
    assert len(list((work / "logs").glob("chain-build-*.log"))) == 2


def test_what_the_queue_does_not_have_is_refused_before_anything_is_submitted(
    cluster: Callable[..., str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = work / "wrong.yaml"
    command = [
        "--",
        "pretrain",
        str(work / "small.yaml"),
        "run=never",
        "training.micro_batch_size=4",
    ]
    before = cluster("squeue", "-h", "-t", "all")
    for backend, nodes, says in (
        ({"type": "slurm", "partition": "gpus"}, 2, "main, urgent"),
        ({"type": "slurm", "partition": "main"}, 4, "has 2 machine(s)"),
    ):
        path.write_text(yaml.safe_dump({"backend": backend, "nodes": nodes, "folder": str(work)}))
        assert main(["launch", str(path), *command]) == 2
        assert says in capsys.readouterr().err
    assert cluster("squeue", "-h", "-t", "all") == before
