"""A run small enough to be started a hundred times, and the commands that start its ranks."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from runs import free_port

PRESET = "time_tracker_tiny"
GLOBAL_BATCH_SIZE = 16
_SMALLER = [
    "model.context_length=192", "model.d_model=32", "model.num_layers=2", "model.num_heads=2",
    "model.feed_forward.num_experts=4", "model.feed_forward.d_ff_expert=32",
    "model.feed_forward.d_ff_shared=32", f"training.global_batch_size={GLOBAL_BATCH_SIZE}",
    "training.device=cpu", "training.log_every_steps=1000",
]  # fmt: skip


def small_settings(corpus: Path, *, steps: int, ranks: int) -> list[str]:
    """Return settings that make the tiny preset smaller, with the same windows in every step.

    One pass of each rank; the engine and how often to save are left to whoever asks.
    """
    micro_batch_size = f"training.micro_batch_size={GLOBAL_BATCH_SIZE // ranks}"
    return [*_SMALLER, micro_batch_size, f"corpus={corpus}", f"training.steps={steps}"]


def pretrain_by_deepspeed(settings: list[str], *, ranks: int) -> list[str]:
    """Return the arguments that start the ranks of this node under DeepSpeed's own launcher.

    What `deepspeed` would call for each node, without the process that looks for nodes.
    """
    devices = json.dumps({"localhost": list(range(ranks))})
    world = base64.urlsafe_b64encode(devices.encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}",
                "--node_rank=0", "--master_addr=127.0.0.1",
                f"--master_port={free_port()}"]  # fmt: skip
    return [*launcher, "--module", "tsmoe", "pretrain", PRESET, *settings]


def recorded(run: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("speed/")}
        for line in lines
    ]


def largest_loss_difference(
    lines: list[dict[str, Any]], reference: list[dict[str, Any]], *, first: int, end: int
) -> float:
    """Compare training and validation losses of the steps from `first` to before `end`.

    Raises:
        ValueError: if the two have not recorded the same steps.
    """
    ours, theirs = (_losses(values, first, end) for values in (lines, reference))
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            f"steps {first} to {end - 1}: {len(ours)} losses of one run and {len(theirs)} of the "
            f"other, of which differ in step or kind: {sorted(ours.keys() ^ theirs.keys())[:5]}"
        )
    return max(abs(loss - theirs[key]) for key, loss in ours.items())


def _losses(lines: list[dict[str, Any]], first: int, end: int) -> dict[tuple[int, str], float]:
    return {
        (line["step"], kind): line[kind]
        for line in lines
        for kind in ("loss/train", "loss/validation")
        if kind in line and first <= line["step"] < end
    }
