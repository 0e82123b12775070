"""What an engine costs in a training step beside the model: DeepSpeed's stages against none.

The model of a preset is trained by each engine in turns inside the same processes; what counts are
ratios of CPU time. A step's collectives are counted by torch's profiler. The default stage is timed
once more in processes that give freed memory back to the system, as glibc does by default.

    python benchmarks/engine_overhead.py             # tiny and small preset, one and two ranks
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from record import record
from runs import environment
from step_speed import random_walks
from step_turns import Turns, take_turns
from tsmoe import ranks as ranks_module
from tsmoe.engine import build
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

PLAIN, DEFAULT = "no DeepSpeed", "stage 1"
ENGINES = {
    PLAIN: ["engine.type=plain"],
    DEFAULT: ["engine.type=deepspeed", "engine.zero_stage=1"],
    "stage 1, offload": ["engine.type=deepspeed", "engine.offloads_optimizer=true"],
    "stage 2": ["engine.type=deepspeed", "engine.zero_stage=2"],
    "stage 3": ["engine.type=deepspeed", "engine.zero_stage=3"],
}
WHOLE = ["engine.expert_parallel_size=1"]
_UNUSED = ["run=unused", "corpus=unused", "training.device=cpu", "training.precision=fp32"]
# Windows of a rank and step; the small preset's have 30 tokens, the tiny one's 14.
WINDOWS = {"time_tracker_tiny": 64, "time_tracker_small": 16}


def make_step(preset: str, settings: list[str], ranks: Ranks) -> Callable[[], object]:
    """Build a preset's model in an engine and return its training step."""
    windows = WINDOWS[preset]
    sizes = [f"training.global_batch_size={windows * ranks.size}",
             f"training.micro_batch_size={windows}"]  # fmt: skip
    config = resolve(preset, [*_UNUSED, *sizes, *settings])
    engine = build.build_engine(config, ranks, prepare=prepare_pretraining)
    batch = random_walks(config.model, windows, seed=ranks.rank)
    return partial(
        training_step,
        engine,
        [batch],
        step=1,
        lr=1e-4,
        balance_rate=1e-3,
        objective=NextPatchObjective(error_unit="window", target_clip=10.0),
        series_name=str,
    )


def worker(output: Path, preset: str, *, rounds: int, keeps_memory: bool) -> None:
    """Time the engines on the ranks of this launch; the first rank writes the figures."""
    if not keeps_memory:
        build.keep_freed_memory = lambda: False
    ranks = ranks_module.start(device="cpu")
    names = list(ENGINES) if keeps_memory else [PLAIN, DEFAULT]
    steps = {}
    for name in names:
        spread = [] if ranks.size == 1 or name == PLAIN else WHOLE
        steps[name] = make_step(preset, ENGINES[name] + spread, ranks)
        if ranks.size > 1 and name in (DEFAULT, "stage 3") and keeps_memory:
            steps[f"{name}, experts spread"] = make_step(preset, ENGINES[name], ranks)
    turns = take_turns(steps, rounds=rounds, warm_up=2, ranks=ranks)
    exchanges = {name: collectives(step) for name, step in steps.items()}
    if ranks.is_first:
        output.write_text(json.dumps({"engines": figures(turns), "collectives": exchanges}))
    ranks_module.stop()


def figures(turns: Turns) -> dict[str, dict[str, float]]:
    """Sum each engine up, and compare it with none round by round."""
    return {
        name: {
            "cpu_ms_median": round(1000 * statistics.median(cpu), 1),
            "wall_ms_median": round(1000 * statistics.median(turns.wall[name]), 1),
            "cpu_over_none": round(1 / turns.speed_over(name, PLAIN), 3),
        }
        for name, cpu in turns.cpu.items()
    }


def collectives(step: Callable[[], object]) -> dict[str, int]:
    """Count the collectives of a step by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    found = {e.key: e.count for e in profiler.key_averages() if e.key.startswith("c10d::")}
    return {key.removeprefix("c10d::").strip("_"): found[key] for key in sorted(found)}


def launch(preset: str, count: int, *, rounds: int, keeps_memory: bool) -> dict[str, Any]:
    """Run the worker on some ranks and return what its first rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={count}", sys.argv[0], "--worker", str(output)]
        command += ["--preset", preset, "--rounds", str(rounds)]
        command += [] if keeps_memory else ["--gives-memory-back"]
        subprocess.run(command, check=True, env=environment())
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def main() -> None:
    """Start the workers and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--preset", choices=sorted(WINDOWS), help="only this one")
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing recorded")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gives-memory-back", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.preset, rounds=args.rounds,
               keeps_memory=not args.gives_memory_back)  # fmt: skip
        return
    rounds = 2 if args.quick else args.rounds
    results: dict[str, Any] = {"windows_per_rank": WINDOWS, "rounds": rounds}
    for preset in [args.preset] if args.preset else sorted(WINDOWS):
        results[preset] = {
            f"{count}_rank": launch(preset, count, rounds=rounds, keeps_memory=True)
            for count in (1, 2)
        }
        given_back = launch(preset, 1, rounds=rounds, keeps_memory=False)
        results[preset]["1_rank_memory_given_back"] = given_back["engines"]
    if args.quick or args.preset:
        print(json.dumps(results, indent=1))
        return
    record("engine_overhead", results, notes="fp32, one thread per rank, engines in turns")


if __name__ == "__main__":
    main()
