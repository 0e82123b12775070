"""Training-step speed of the whole model: ours against dense twins and others' expert layers.

All are the same transformer with the same active sizes and differ in the feed-forward part. They
are trained in turns inside the same processes, under DeepSpeed with ZeRO 1, so that a busy machine
slows all of them alike; what counts are ratios of CPU time, summed over ranks. The share of the
machine's matrix-product rate is from the same rounds. All multiply float32 matrices by oneDNN, as
our training does; in fp32 DeepSpeed's layer is also timed as it comes, by torch's default.

    python benchmarks/step_speed.py                      # fp32: one rank, then two
    python benchmarks/step_speed.py --precision bf16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from record import record
from runs import environment
from step_turns import GEMM, GEMM_DEFAULT, Turns, take_turns
from step_variants import LOOP, OURS, STOCK, STOCK_ALL, twin_model
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.cost.flops import training_flops
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.deepspeed_engine import DeepSpeedEngine, expert_factory, initialise_deepspeed
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.host_memory import keep_freed_memory
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.train import step as step_module
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

TWINS = ("dense", STOCK, STOCK_ALL, LOOP)
AS_IT_COMES = ", torch's default products"


def model_config(d_model: int) -> TimeTrackerConfig:
    """The model that is compared: 14 tokens a window of 672 points, 8 experts of which 2."""
    feed_forward = MoEConfig(d_ff_expert=d_model, d_ff_shared=2 * d_model)
    return TimeTrackerConfig(
        patch_length=48, patch_stride=48, context_length=672, d_model=d_model, num_layers=4,
        num_heads=4, feed_forward=feed_forward,
    )  # fmt: skip


def random_walks(config: TimeTrackerConfig, windows: int, *, seed: int) -> WindowBatch:
    """Make a batch of windows, every point recorded."""
    generator = torch.Generator().manual_seed(seed)
    values_BCL = torch.randn(windows, 1, config.window_length, generator=generator).cumsum(-1)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BCL, observed_BCL=is_true, is_target_BCL=is_true,
        series_ids_B=torch.zeros(windows, dtype=torch.int64),
    )  # fmt: skip


def step_by_default_products(**settings: Any) -> None:
    """Do a step whose float32 products torch multiplies as it does by default."""
    with patch.object(step_module, "exact_onednn_matmul", nullcontext):
        training_step(**settings)


def worker(output: Path, *, d_model: int, windows: int, rounds: int, precision: str) -> None:
    """Time each variant in turns on the ranks of this launch; the first rank writes the figures."""
    ranks = ranks_module.start()
    keep_freed_memory()  # as runs do
    initialise_deepspeed(ranks, timeout_seconds=600)
    engine_config = DeepSpeedEngineConfig(expert_parallel_size=ranks.size)
    make_experts = expert_factory(ranks.size, ranks, zero_stage=engine_config.zero_stage)
    config = model_config(d_model)
    batch = random_walks(config, windows, seed=ranks.rank)
    steps: dict[str, Callable[[], object]] = {}
    for name in (*TWINS, *OURS):
        # The loop knows no other ranks: there every rank has all experts.
        model = twin_model(name, config, make_experts, ranks.size)
        prepare_pretraining(model)
        engine = DeepSpeedEngine(
            model, engine_config, OptimizerConfig(), precision=precision,  # type: ignore[arg-type]
            micro_batch_size=windows, gradient_accumulation_steps=1, ranks=ranks,
        )  # fmt: skip
        settings: dict[str, Any] = {
            "engine": engine, "micro_batches": [batch], "step": 1, "lr": 1e-4,
            # The bias update costs nothing but keeps ours as balanced as in training.
            "balance_rate": 1e-3 if name in OURS else 0.0,
            "error_unit": "window", "target_clip": 10.0, "series_name": str,
        }  # fmt: skip
        steps[name] = partial(training_step, **settings)
        if name in (STOCK, STOCK_ALL) and precision == "fp32":
            steps[name + AS_IT_COMES] = partial(step_by_default_products, **settings)
    turns = take_turns(steps, rounds=rounds, warm_up=2, ranks=ranks, gemm_precision=precision)
    if ranks.is_first:
        flops = training_flops(config, windows=windows * ranks.size).total
        found = summary(turns, flops=flops, windows=windows * ranks.size, config=config)
        output.write_text(json.dumps(found))
    ranks_module.stop()


def summary(
    turns: Turns, *, flops: float, windows: int, config: TimeTrackerConfig
) -> dict[str, Any]:
    """Put speeds, ratios and shares together."""
    twins = [name for name in turns.cpu if name not in (*OURS, GEMM, GEMM_DEFAULT)]
    points = windows * config.context_length
    tokens = points // config.patch_length
    return {
        "tokens_per_step": tokens,
        "gflop_per_step": round(flops / 1e9, 1),
        "gemm_gflops_per_core": turns.gemm_gflops(),
        "share_of_gemm_rate": {
            gemm: {n: turns.gemm_share(n, flops, gemm=gemm) for n in ("dense", *OURS)}
            for gemm in (GEMM, GEMM_DEFAULT)
        },
        "speed_over": {t: {n: turns.speed_over(n, t) for n in OURS} for t in twins},
        "variants": {
            n: turns.figures(n, tokens=tokens, points=points) for n in (*twins, *OURS)
        },
    }  # fmt: skip


def launch(count: int, arguments: list[str]) -> dict[str, Any]:
    """Run this script's worker on some ranks and return what its first rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={count}", sys.argv[0], *arguments]
        subprocess.run([*command, "--worker", str(output)], check=True, env=environment())
        figures: dict[str, Any] = json.loads(output.read_text())
        return figures


def main() -> None:
    """Start the workers with one and with two ranks and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--windows", type=int, default=256, help="per rank and step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--quick", action="store_true", help="small, to see that all runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.windows, args.rounds = min(args.windows, 32), min(args.rounds, 2)
    if args.worker:
        worker(args.worker, d_model=args.d_model, windows=args.windows, rounds=args.rounds,
               precision=args.precision)  # fmt: skip
        return
    results: dict[str, Any] = {
        "d_model": args.d_model, "windows_per_rank": args.windows, "rounds": args.rounds,
        "precision": args.precision,
    }  # fmt: skip
    for count in (1, 2):
        results[f"{count}_rank"] = launch(count, sys.argv[1:])
    if args.quick:
        print(json.dumps(results, indent=1))
        return
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    record(f"step_speed{suffix}", results, notes="one thread per rank; variants in turns")


if __name__ == "__main__":
    main()
