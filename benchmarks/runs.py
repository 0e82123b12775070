"""Start training runs of the command line and read back what they recorded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import ROOT


def corpus(folder: Path) -> Path:
    """Build the embedded corpus."""
    tsmoe(["data", "build", "tiny", "--out", str(folder)])
    return folder


def tsmoe(arguments: list[str]) -> None:
    """Run one command of the program in a process of its own."""
    subprocess.run([sys.executable, "-m", "tsmoe", *arguments], check=True, env=environment())


def pretrain_command(settings: list[str], *, ranks: int) -> list[str]:
    """Return the arguments that pretrain the tiny preset on some ranks."""
    program = ["tsmoe", "pretrain", "time_tracker_tiny", *settings]
    if ranks == 1:
        return [sys.executable, "-m", *program]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), "-m", *program]


def environment() -> dict[str, str]:
    """Environment of a benchmark: one thread per rank, on the CPU unless there is a GPU."""
    import torch

    values = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not torch.cuda.is_available():
        values["DS_ACCELERATOR"] = "cpu"
    return values


def pretrain(settings: list[str], *, ranks: int) -> None:
    """Pretrain and wait for the end."""
    subprocess.run(pretrain_command(settings, ranks=ranks), check=True, env=environment())


def steps(run: Path) -> Iterator[dict[str, Any]]:
    """Read the recorded training steps."""
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "loss/train" in values:
            yield values


def losses(run: Path) -> list[float]:
    """Read the training losses in order of step."""
    return [values["loss/train"] for values in steps(run)]


def last_validation(run: Path) -> float:
    """Read the last validation loss."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line).get("loss/validation") for line in lines]
    return [loss for loss in found if loss is not None][-1]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
