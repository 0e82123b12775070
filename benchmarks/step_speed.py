"""Training-step speed: our expert layers against dense twins and DeepSpeed's own expert layer.

The variants are trained in turns inside the same processes, under DeepSpeed with ZeRO 1, so that a
busy machine slows all of them alike; what counts are the ratios. CPU time is summed over ranks.

    python benchmarks/step_speed.py    # one process, then two ranks with experts in parallel
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from record import record
from runs import environment
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.deepspeed_engine import DeepSpeedEngine, expert_factory, initialise_deepspeed
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.feed_forward import SwiGLU
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

CAPACITY = 1.25


class StockLayer(nn.Module):
    """DeepSpeed's own expert layer beside the same shared network; it drops what overflows."""

    def __init__(self, config: MoEConfig, d_model: int, ep_size: int) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.always_on = SwiGLU(d_model, config.num_shared_experts * config.d_ff_shared)
        self.stock = MoE(
            d_model,
            SwiGLU(d_model, config.d_ff_expert),
            num_experts=config.num_experts,
            ep_size=ep_size,
            k=config.router.top_k,
            capacity_factor=CAPACITY,
        )

    def forward(self, tokens_BCND: Tensor) -> Tensor:
        """Run both parts."""
        hidden_BCND, _, _ = self.stock(tokens_BCND)
        return self.always_on(tokens_BCND) + hidden_BCND


def model_config(d_model: int) -> TimeTrackerConfig:
    """The model that is compared: 14 tokens a window of 672 points, 8 experts of which 2."""
    feed_forward = MoEConfig(d_ff_expert=d_model, d_ff_shared=2 * d_model)
    return TimeTrackerConfig(
        patch_length=48, patch_stride=48, context_length=672, d_model=d_model, num_layers=4,
        num_heads=4, feed_forward=feed_forward,
    )  # fmt: skip


def build_variant(name: str, config: TimeTrackerConfig, make_experts: Any, ep: int) -> TimeTracker:
    """Build `dense`, `stock`, or ours with the router mode of that name."""
    moe = config.feed_forward
    assert isinstance(moe, MoEConfig)
    if name == "dense":
        return build_model(replace(config, feed_forward=DenseConfig(d_ff=moe.active_d_ff)))
    if name == "stock":
        model = build_model(replace(config, feed_forward=DenseConfig(d_ff=4)))
        for block in model.blocks:
            block.feed_forward = StockLayer(moe, config.d_model, ep)
        return model
    router = SequenceRouterConfig(mode=name)  # type: ignore[arg-type]
    changed = replace(config, feed_forward=replace(moe, router=router))
    return build_model(changed, make_experts=make_experts)


def worker(output: Path, *, d_model: int, windows: int, rounds: int, precision: str) -> None:
    """Time each variant in turns on the ranks of this launch; the first rank writes the figures."""
    ranks = ranks_module.start()
    initialise_deepspeed(ranks, timeout_seconds=600)
    engine_config = DeepSpeedEngineConfig(expert_parallel_size=ranks.size)
    make_experts = expert_factory(ranks.size, ranks)
    config = model_config(d_model)
    engines = {}
    for name in ("dense", "stock", "token", "prefix", "sequence"):
        model = build_variant(name, config, make_experts, ranks.size)
        prepare_pretraining(model)
        engines[name] = DeepSpeedEngine(
            model, engine_config, OptimizerConfig(), precision=precision,  # type: ignore[arg-type]
            micro_batch_size=windows, gradient_accumulation_steps=1, ranks=ranks,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(ranks.rank)
    length = config.window_length
    values_BCL = torch.randn(windows, 1, length, generator=generator).cumsum(-1)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    batch = WindowBatch(
        values_BCL=values_BCL, observed_BCL=is_true, is_target_BCL=is_true,
        series_ids_B=torch.zeros(windows, dtype=torch.int64),
    )  # fmt: skip
    wall: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, engine in engines.items():
            ranks.barrier()
            begun, cpu_begun = time.perf_counter(), time.process_time()
            # The bias update costs nothing but keeps ours as balanced as in training.
            rate = 0.0 if name in ("dense", "stock") else 1e-3
            training_step(
                engine, [batch], step=turn, lr=1e-4, balance_rate=rate, error_unit="window",
                target_clip=10.0, series_name=str,
            )  # fmt: skip
            ranks.barrier()
            cpu_seconds = torch.tensor(time.process_time() - cpu_begun, dtype=torch.float64)
            if turn:  # the first turn warms up
                wall[name].append(time.perf_counter() - begun)
                cpu[name].append(float(ranks.sum(cpu_seconds)))
            else:
                ranks.sum(cpu_seconds)
    if ranks.is_first:
        tokens = windows * ranks.size * config.context_length // config.patch_length
        points = windows * ranks.size * config.context_length
        figures = {
            name: {
                "points_per_second_best": round(points / min(wall[name])),
                "points_per_second_median": round(points / statistics.median(wall[name])),
                "tokens_per_cpu_second_best": round(tokens / min(cpu[name])),
                "tokens_per_cpu_second_median": round(tokens / statistics.median(cpu[name])),
            }
            for name in engines
        }
        output.write_text(json.dumps({"tokens_per_step": tokens, "variants": figures}))
    ranks_module.stop()


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Tokens per CPU-second of ours over those of the twins, medians."""
    speed = {name: v["tokens_per_cpu_second_median"] for name, v in figures["variants"].items()}
    return {
        f"{ours}_over_{twin}": round(speed[ours] / speed[twin], 3)
        for ours in ("token", "prefix", "sequence")
        for twin in ("dense", "stock")
    }


def main() -> None:
    """Start the workers with one and with two ranks and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--windows", type=int, default=256, help="per rank and step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    run = partial(worker, d_model=args.d_model, windows=args.windows, rounds=args.rounds,
                  precision=args.precision)  # fmt: skip
    if args.worker:
        run(args.worker)
        return
    results: dict[str, Any] = {
        "d_model": args.d_model, "windows_per_rank": args.windows, "rounds": args.rounds,
        "precision": args.precision, "stock_capacity": CAPACITY,
    }  # fmt: skip
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "figures.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={count}", __file__, *sys.argv[1:]]
            subprocess.run([*launch, "--worker", str(output)], check=True, env=environment())
            figures = json.loads(output.read_text())
        results[f"{count}_rank"] = figures | {"ratios": ratios(figures)}
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    record(f"step_speed{suffix}", results, notes="one thread per rank; variants in turns")


if __name__ == "__main__":
    main()
