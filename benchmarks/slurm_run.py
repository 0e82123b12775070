"""Run a training on two nodes of a SLURM cluster through all that clusters do to it.

A run of one rank a node, experts spread, submitted by `tsmoe launch`, meets its time limit twice,
a node that loses its power and `scontrol requeue`; its losses must be those of the same run without
a queue. A second launch builds a corpus by a job array, trains and exports. Needs SLURM's commands
and a partition with two idle nodes; what cuts a node's power is up to the cluster:

    python benchmarks/slurm_run.py --power-off "power off {node}" --power-on "power on {node}"
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from record import record

_SETTINGS = [
    "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.dropout=0.1",
    "model.feed_forward.d_ff_expert=32", "model.feed_forward.d_ff_shared=32",
    "training.global_batch_size=32", "training.micro_batch_size=16",
    "training.validate_every_steps=500", "checkpoint.every_steps=50", "checkpoint.keep=3",
    "engine.zero_stage=1",
]  # fmt: skip


def launch(folder: Path, values: dict[str, Any], command: list[str]) -> str:
    """Start `tsmoe launch` in a folder and return what it printed."""
    path = folder / f"{values['name']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    words = [sys.executable, "-m", "tsmoe", "launch", str(path), *command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}: {done.stderr}")
    return done.stdout


def wait(is_so: Callable[[], Any], what: str, *, seconds: float = 900) -> float:
    """Wait for something and return how long that took."""
    begun = time.monotonic()
    while not is_so():
        if time.monotonic() - begun > seconds:
            raise SystemExit(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.2)
    return time.monotonic() - begun


class WatchedRun:
    """What a run folder tells from outside."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def restarts(self) -> list[dict[str, Any]]:
        """Return the lines of restarts.jsonl."""
        path = self.folder / "restarts.jsonl"
        return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []

    def newest(self) -> int:
        """Return the step of the newest checkpoint."""
        names = [path.name[5:] for path in (self.folder / "checkpoints").glob("step_*")]
        return max(map(int, names), default=0)

    def losses(self) -> list[float]:
        """Return the loss of every step, which must be there once."""
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        by_step = [(line["step"], line["loss/train"]) for line in lines if "loss/train" in line]
        assert [step for step, _ in by_step] == list(range(len(by_step)))
        return [loss for _, loss in by_step]


def _is_past(run: WatchedRun, *, step: int | None = None, starts: int | None = None) -> bool:
    if step is not None:
        return run.newest() > step
    return starts is not None and len(run.restarts()) > starts


def queued_values(folder: Path, args: argparse.Namespace, *, name: str) -> dict[str, Any]:
    """Return the launch file of a run on two nodes."""
    return {
        "name": name,
        "nodes": 2,
        "threads_per_rank": 1,
        "folder": str(folder),
        "environment": {"DS_ACCELERATOR": "cpu"},
        "backend": {
            "type": "slurm",
            "partition": args.partition,
            "time_limit": str(args.minutes),
            "stop_seconds_before": args.stop_seconds_before,
        },
    }


def alone(folder: Path) -> dict[str, Any]:
    """Return the launch file of two ranks without a queue."""
    return {"name": "alone", "ranks_per_node": 2, "threads_per_rank": 1, "folder": str(folder),
            "environment": {"DS_ACCELERATOR": "cpu"}}  # fmt: skip


def disturb(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Submit the run and let everything happen to it; return what was seen."""
    values = queued_values(folder, args, name="queued")
    command = ["pretrain", "time_tracker_tiny", "corpus=corpus", *_SETTINGS]
    steps = f"training.steps={args.steps}"
    printed = launch(folder, values, ["--", *command, "run=queued", steps])
    job = printed.split(" as job ")[1].split(";")[0]
    run = WatchedRun(folder / "queued")
    seen: dict[str, Any] = {
        "submitted": shlex.join(["tsmoe", "launch", "queued.yaml", "--", *command])
    }

    wait(lambda: len(run.restarts()) >= 2, "two time limits")
    limits = run.restarts()[:2]
    assert all(start["outcome"] == "stopped" for start in limits), limits
    seen["time_limits"] = [start["reason"] for start in limits]

    step = run.newest()
    if args.power_off:
        wait(lambda: run.newest() > step, "progress")
        power(args.power_off, "n2")
        before = run.newest()
        seconds = wait(lambda: state_of(job) == "PENDING", "the queue to notice the lost node")
        power(args.power_on, "n2")
        seconds_to_resume = wait(lambda: run.newest() > before, "progress after the lost node")
        seen["lost_node"] = {
            "seconds_until_requeued": round(seconds, 1),
            "seconds_from_requeued_to_next_checkpoint": round(seconds_to_resume, 1),
        }
    before, number = run.newest(), len(run.restarts())
    subprocess.run(["scontrol", "requeue", job], check=True)
    seconds = wait(lambda: run.newest() > before, "progress after scontrol requeue")
    seen["scontrol_requeue"] = {"seconds_to_next_checkpoint": round(seconds, 1)}
    wait(lambda: (run.folder / "DONE").exists(), "the end of the run", seconds=1800)
    wait(lambda: state_of(job) not in ("RUNNING", "COMPLETING", "PENDING"), "the end of the job")
    assert len(run.restarts()) > number
    seen["starts"] = [
        {key: start[key] for key in ("restart", "outcome", "step_before", "step", "reason")}
        for start in run.restarts()
    ]
    seen["state"] = state_of(job)
    launch(folder, alone(folder), ["--", *command, "run=alone", steps])
    pairs = list(zip(run.losses(), WatchedRun(folder / "alone").losses(), strict=True))
    seen["steps_compared"] = len(pairs)
    seen["largest_difference_of_losses"] = max(abs(a - b) for a, b in pairs)
    return seen


def shrink(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Go on with one node while the other is drained, and with both again."""
    values = queued_values(folder, args, name="shrinking")
    values["backend"] |= {"least_nodes": 1, "time_limit": "30"}
    # Ranks draw their own dropout; without it losses of any number of them differ by rounding.
    command = ["pretrain", "time_tracker_tiny", "corpus=corpus", *_SETTINGS, "model.dropout=0"]
    steps = f"training.steps={args.steps}"
    printed = launch(folder, values, ["--", *command, "run=shrinking", steps])
    job = printed.split(" as job ")[1].split(";")[0]
    run = WatchedRun(folder / "shrinking")
    for state in ("DRAIN", "RESUME"):
        step, starts = run.newest(), len(run.restarts())
        wait(partial(_is_past, run, step=step), "progress")
        subprocess.run(
            ["scontrol", "update", "NodeName=n2", f"State={state}", "Reason=benchmark"], check=True
        )
        subprocess.run(["scancel", "--signal=USR1", job], check=True)
        wait(partial(_is_past, run, starts=starts), "the end of a start")
    wait(lambda: (run.folder / "DONE").exists(), "the end of the run", seconds=1800)
    wait(lambda: state_of(job) not in ("RUNNING", "COMPLETING", "PENDING"), "the end of the job")
    launch(folder, alone(folder), ["--", *command, "run=steady", steps])
    pairs = list(zip(run.losses(), WatchedRun(folder / "steady").losses(), strict=True))
    return {
        "nodes_of_each_start": [len(start["nodes"]) for start in run.restarts()],
        "steps_of_each_start": [start["step"] for start in run.restarts()],
        "largest_difference_of_losses": max(abs(a - b) for a, b in pairs),
    }


def chain(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Build a corpus by a job array, train on it and export the package."""
    train = ["pretrain", "time_tracker_tiny", "run=chained", "corpus=built", *_SETTINGS]
    stages = [
        {"name": "build", "array": 2, "command": ["data", "build", "tiny", "--out", "built"]},
        {"name": "train", "after": ["build"], "command": [*train, "training.steps=20"]},
        {"name": "export", "after": ["train"], "command": ["export", "chained", "chained/package"]},
    ]
    values = {
        "name": "chain", "nodes": 2, "threads_per_rank": 1, "folder": str(folder),
        "environment": {"DS_ACCELERATOR": "cpu"}, "stages": stages,
        "backend": {"type": "slurm", "partition": args.partition, "time_limit": "20"},
    }  # fmt: skip
    begun = time.monotonic()
    printed = launch(folder, values, [])
    card = folder / "chained" / "package" / "card.json"
    wait(card.exists, "the package at the end of the chain")
    return {
        "jobs": printed.count(" as job "),
        "array_tasks": 2,
        "seconds": round(time.monotonic() - begun, 1),
        "package_of_step": json.loads(card.read_text())["step"],
        "corpus_is_the_same_as_by_one_task": fingerprint(folder / "built")
        == fingerprint(folder / "corpus"),
    }


def fingerprint(corpus: Path) -> str:
    """Return the fingerprint of a corpus."""
    return json.loads((corpus / "manifest.json").read_text())["fingerprint"]


def power(command: str, node: str) -> None:
    """Cut or restore the power of a node."""
    subprocess.run(shlex.split(command.format(node=node)), check=True, capture_output=True)


def state_of(job: str) -> str:
    """Return the state of a job."""
    shown = subprocess.run(
        ["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True, check=True
    )
    return shown.stdout.split("JobState=")[1].split()[0]


def main() -> None:
    """Run both and write results/slurm_run.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/slurm_run"))
    parser.add_argument("--partition", default="main")
    parser.add_argument("--minutes", type=int, default=2, help="time limit of a job")
    parser.add_argument("--stop-seconds-before", type=int, default=45)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--power-off", help="command that cuts a node's power; {node} is its name")
    parser.add_argument("--power-on", help="command that starts it again")
    args = parser.parse_args()
    if bool(args.power_off) != bool(args.power_on):
        parser.error("--power-off and --power-on belong together")
    folder = args.out.absolute()
    if folder.exists():
        parser.error(f"{folder} is there already; remove it or name another --out")
    folder.mkdir(parents=True)
    build = [
        sys.executable,
        "-m",
        "tsmoe",
        "data",
        "build",
        "tiny",
        "--out",
        str(folder / "corpus"),
    ]
    subprocess.run(build, check=True, capture_output=True)
    seen = {
        "chain": chain(folder, args),
        "disturbed": disturb(folder, args),
        "fewer_nodes": shrink(folder, args),
    }
    version = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True)
    # Commands that cut the power name paths of the machine.
    sys.argv[1:] = [word for word in sys.argv[1:] if "{node}" not in word]
    record("slurm_run", seen, notes=f"{version.stdout.strip()}, two nodes on one machine")


if __name__ == "__main__":
    main()
