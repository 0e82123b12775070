"""A run that `tsmoe launch` starts, and what can be told of it from outside."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

STEPS, EVERY = 160, 5
# Two ranks that share the experts, and a run long enough to be disturbed more than once.
LONG = {
    "model": {"dropout": 0.1},
    "training": {"steps": STEPS, "validate_every_steps": 40},
    "checkpoint": {"every_steps": EVERY, "keep": 3},
    "engine": {"type": "deepspeed", "zero_stage": 1},
}
RANKS = {"DS_ACCELERATOR": "cpu"}


def launch_file(work: Path, values: dict) -> Path:
    path = work / "launch.yaml"
    path.write_text(yaml.safe_dump({"environment": RANKS, "folder": str(work), **values}))
    return path


def launch_words(work: Path, values: dict, *settings: str) -> list[str]:
    words = [sys.executable, "-m", "tsmoe", "launch", str(launch_file(work, values)), "--"]
    return [*words, "pretrain", str(work / "small.yaml"), *settings]


def launch(work: Path, values: dict, *settings: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        launch_words(work, values, *settings),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses_of(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    by_step = [(line["step"], line["loss/train"]) for line in lines if "loss/train" in line]
    assert [step for step, _ in by_step] == list(range(len(by_step)))  # none twice, none missing
    return [loss for _, loss in by_step]


def restarts_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "restarts.jsonl").read_text().splitlines()]


def newest(run: Path) -> int:
    names = [path.name for path in (run / "checkpoints").glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def ranks_in(run: Path) -> list[int]:
    """Process ids of the ranks that train in a run folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        is_rank = any(word.startswith("RANK=") for word in environment)
        if is_rank and f"run={run.name}" in words and words[1:2] != ["-m"] and "-u" in words[:2]:
            found.append(int(folder.name))
    return sorted(found)


def wait_until(is_so: Callable[[], object], *, what: str, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.2)
