"""Equal losses for every way to run the same steps, and after a kill.

Runs the tiny preset for some steps on one process, two ranks data parallel, and two ranks with
experts in parallel under ZeRO 1, 2 and 3, and compares losses and gradient norms with those of the
one process. Then kills a two-rank run with SIGKILL at a random step, starts it again, and compares
with the run that was left alone.

    python benchmarks/parity.py --steps 20
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from record import record
from runs import corpus, environment, losses, pretrain, pretrain_command, steps

DEEPSPEED = "engine.type=deepspeed"
WAYS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, ["engine.type=plain"]),
    "2 ranks data parallel": (2, ["engine.type=plain"]),
    "2 ranks DeepSpeed, expert parallel 1, ZeRO 1": (
        2, [DEEPSPEED, "engine.expert_parallel_size=1", "engine.zero_stage=1"]),
    "2 ranks DeepSpeed, expert parallel 2, ZeRO 1": (
        2, [DEEPSPEED, "engine.expert_parallel_size=2", "engine.zero_stage=1"]),
    "2 ranks DeepSpeed, expert parallel 2, ZeRO 2": (
        2, [DEEPSPEED, "engine.expert_parallel_size=2", "engine.zero_stage=2"]),
    "2 ranks DeepSpeed, expert parallel 2, ZeRO 2, accumulation 2": (
        2, [DEEPSPEED, "engine.expert_parallel_size=2", "engine.zero_stage=2",
            "training.micro_batch_size=32"]),
    "2 ranks DeepSpeed, expert parallel 2, ZeRO 3": (
        2, [DEEPSPEED, "engine.expert_parallel_size=2", "engine.zero_stage=3"]),
    "2 ranks DeepSpeed, expert parallel 1, ZeRO 3, offload, accumulation 2": (
        2, [DEEPSPEED, "engine.expert_parallel_size=1", "engine.zero_stage=3",
            "engine.offloads_optimizer=true", "training.micro_batch_size=32"]),
    "2 ranks DeepSpeed, expert parallel 2, ZeRO 1, offload": (
        2, [DEEPSPEED, "engine.expert_parallel_size=2", "engine.offloads_optimizer=true"]),
}  # fmt: skip


def compare_ways(folder: Path, common: list[str]) -> dict[str, Any]:
    """Return the largest differences from the one process."""
    recorded = {}
    for number, (way, (ranks, settings)) in enumerate(WAYS.items()):
        run = folder / f"way{number}"
        pretrain([*common, *settings, f"run={run}"], ranks=ranks)
        recorded[way] = list(steps(run))
    reference = recorded["one process"]
    return {
        way: {
            "largest_loss_difference": _largest(values, reference, "loss/train"),
            "largest_relative_grad_norm_difference": max(
                abs(a["optimizer/grad_norm"] / b["optimizer/grad_norm"] - 1)
                for a, b in zip(values, reference, strict=True)
            ),
            "equal_loads_and_biases": all(
                a["experts"]["load"] == b["experts"]["load"]
                and a["experts"]["load_bias"] == b["experts"]["load_bias"]
                for a, b in zip(values, reference, strict=True)
            ),
        }
        for way, values in recorded.items()
    }


def kill_and_resume(folder: Path, common: list[str], num_steps: int, seed: int) -> dict[str, Any]:
    """Kill every process of a two-rank run at a random step, start it again, compare."""
    settings = [*common, *WAYS["2 ranks DeepSpeed, expert parallel 2, ZeRO 1"][1],
                "checkpoint.every_steps=4"]  # fmt: skip
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    pretrain([*settings, f"run={undisturbed}"], ranks=2)
    kill_at = random.Random(seed).randrange(5, num_steps - 2)
    command = pretrain_command([*settings, f"run={killed}"], ranks=2)
    process = psutil.Popen(command, env=environment())
    while not (killed / "metrics.jsonl").exists() or len(losses(killed)) < kill_at:
        time.sleep(0.02)
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
    # The ranks too: a launcher that dies alone leaves them training.
    doomed = [process, *process.children(recursive=True)]
    for victim in doomed:
        victim.kill()
    psutil.wait_procs(doomed)
    reached = len(losses(killed))
    if reached >= num_steps:
        raise SystemExit("the run ended before it could be killed")
    saved = sorted(path.name for path in (killed / "checkpoints").glob("step_*"))
    pretrain([*settings, f"run={killed}"], ranks=2)
    pairs = zip(losses(killed), losses(undisturbed), strict=True)
    return {
        "killed_after_step": reached,
        "checkpoints_then": saved,
        "largest_loss_difference": max(abs(a - b) for a, b in pairs),
    }


def _largest(values: list[dict[str, Any]], reference: list[dict[str, Any]], key: str) -> float:
    return max(abs(a[key] - b[key]) for a, b in zip(values, reference, strict=True))


def main() -> None:
    """Run all ways and record the differences."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--kill-seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = [f"corpus={corpus(folder / 'corpus')}", f"training.steps={args.steps}",
                  "checkpoint.every_steps=1000"]  # fmt: skip
        results = {
            "steps": args.steps,
            "differences_from_one_process": compare_ways(folder, common),
            "killed_and_resumed": kill_and_resume(folder, common, args.steps, args.kill_seed),
        }
    record("parity", results, notes="time_tracker_tiny, fp32, global batch 128, seed 0")


if __name__ == "__main__":
    main()
