"""Training steps of peers' own models beside ours, in turns in one process.

Timer-XL (OpenLTM) at equal active size, width and patch length; Time-MoE, whose tokens are points,
at equal width and depth with equal expert sizes. Neither is a package, so PEERS names a folder with
clones; without it only ours run, and what counts is the share of the machine's matrix-product rate.

    git clone https://github.com/thuml/OpenLTM $PEERS/OpenLTM
    git clone https://github.com/Time-MoE/Time-MoE $PEERS/Time-MoE
    pip install --target $PEERS/site transformers==4.40.1 einops   # what these two want
    PEERS=folder python benchmarks/peer_steps.py

Each peer's step is forward, its loss, backward and torch's fused AdamW; in bf16 by autocast. Ours
is the whole step under DeepSpeed: with clipping, checks and load balancing. Our training multiplies
float32 matrices by oneDNN; so that one sees what that makes, peers run with it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from record import ROOT, record
from runs import environment
from step_speed import random_walks
from step_turns import GEMM, GEMM_DEFAULT, Turns, take_turns
from step_variants import twin_model
from tsmoe import ranks as ranks_module
from tsmoe.cost.flops import training_flops
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.deepspeed_engine import DeepSpeedEngine, expert_factory, initialise_deepspeed
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.host_memory import keep_freed_memory
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

CONTEXT = 960
FP32_ONEDNN = "fp32 by oneDNN"
# The file that a clone must have, by peer.
FILES = {
    "Timer-XL": "OpenLTM/models/timer_xl.py",
    "Time-MoE": "Time-MoE/time_moe/models/modeling_time_moe.py",
}


@dataclass(frozen=True, kw_only=True)
class Match:
    """A peer's model and ours of equal active size."""

    peer: str
    build: Callable[[], nn.Module]
    """Returns the peer's model; its forward takes values_BL and returns its loss."""
    peer_windows: int
    windows: int
    config: TimeTrackerConfig


class TimerXL(nn.Module):
    """Timer-XL of 5 layers of 384 with its loss: the mean squared error of each next patch."""

    def __init__(self, patch_length: int) -> None:
        super().__init__()
        from models.timer_xl import Model  # type: ignore[import-not-found]

        self.patch_length = patch_length
        self.model = Model(SimpleNamespace(
            input_token_len=patch_length, output_token_len=patch_length, d_model=384, n_heads=6,
            d_ff=1536, e_layers=5, dropout=0.0, activation="relu", output_attention=False,
            covariate=False, flash_attention=True, use_norm=True,
        ))  # fmt: skip

    def forward(self, values_BL: Tensor) -> Tensor:
        """Predict each next patch."""
        context, target = values_BL[:, :CONTEXT, None], values_BL[:, self.patch_length :, None]
        return (self.model(context, None, None) - target).square().mean()


class TimeMoE(nn.Module):
    """Time-MoE of 4 layers of 256: 8 experts of 256, of which 2, beside a shared one of 512."""

    def __init__(self) -> None:
        super().__init__()
        from time_moe.models.configuration_time_moe import TimeMoeConfig
        from time_moe.models.modeling_time_moe import TimeMoeForPrediction

        config = TimeMoeConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_experts=8, num_experts_per_tok=2, horizon_lengths=[1], use_cache=False,
            max_position_embeddings=CONTEXT,
        )  # fmt: skip
        config._attn_implementation = "eager"  # the only one without flash-attn
        self.model = TimeMoeForPrediction(config)

    def forward(self, values_BL: Tensor) -> Tensor:
        """Predict each next point; its own loss, with its balance loss."""
        values_BL = (values_BL - values_BL.mean(1, keepdim=True)) / values_BL.std(1, keepdim=True)
        context, target = values_BL[:, :CONTEXT], values_BL[:, 1 : CONTEXT + 1]
        output = self.model(
            input_ids=context,
            labels=target[..., None],
            loss_masks=torch.ones_like(target)[..., None],
        )
        loss: Tensor = output.loss
        return loss


def ours(*, patch_length: int, d_model: int, num_layers: int, width: int) -> TimeTrackerConfig:
    """Return our config: 8 experts of `width`, of which 2, beside a shared one of twice that."""
    return TimeTrackerConfig(
        patch_length=patch_length, patch_stride=patch_length, context_length=CONTEXT,
        d_model=d_model, num_layers=num_layers, num_heads=d_model // 64,
        feed_forward=MoEConfig(d_ff_expert=width, d_ff_shared=2 * width),
    )  # fmt: skip


# Timer-XL's feed-forward network has two matrices of 4 d, ours three: 8/3 d is as much.
MATCHES = {
    "Timer-XL, 5 layers of 384, 96-point patches, 64 windows": Match(
        peer="Timer-XL", build=partial(TimerXL, 96), peer_windows=64, windows=64,
        config=ours(patch_length=96, d_model=384, num_layers=5, width=256),
    ),
    "Timer-XL, 5 layers of 384, 96-point patches, 256 windows": Match(
        peer="Timer-XL", build=partial(TimerXL, 96), peer_windows=256, windows=256,
        config=ours(patch_length=96, d_model=384, num_layers=5, width=256),
    ),
    "Timer-XL, 5 layers of 384, 16-point patches, 32 windows": Match(
        peer="Timer-XL", build=partial(TimerXL, 16), peer_windows=32, windows=32,
        config=ours(patch_length=16, d_model=384, num_layers=5, width=256),
    ),
    "Time-MoE, 4 layers of 256, points; ours 96-point patches": Match(
        peer="Time-MoE", build=TimeMoE, peer_windows=4, windows=256,
        config=ours(patch_length=96, d_model=256, num_layers=4, width=256),
    ),
}  # fmt: skip


def peer_step(match: Match, kind: str) -> tuple[Callable[[], None], int]:
    """Return a peer's training step and its operations."""
    torch.manual_seed(0)
    model = match.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    values_BCL = random_walks(match.config, match.peer_windows, seed=0).values_BCL
    values_BL = values_BCL[:, 0]

    def step() -> None:
        is_bf16 = kind == "bf16"
        with exact_onednn_matmul() if kind == FP32_ONEDNN else nullcontext():
            with torch.autocast("cpu", dtype=torch.bfloat16) if is_bf16 else nullcontext():
                loss = model(values_BL.clone())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


def our_step(match: Match, mode: str, precision: str, ranks: Ranks) -> Callable[[], object]:
    """Return our training step, with experts of one rank."""
    make_experts = expert_factory(1, ranks, zero_stage=1)
    model = twin_model(mode, match.config, make_experts, 1)
    prepare_pretraining(model)
    engine = DeepSpeedEngine(
        model, DeepSpeedEngineConfig(), OptimizerConfig(), precision=precision,  # type: ignore[arg-type]
        micro_batch_size=match.windows, gradient_accumulation_steps=1, ranks=ranks,
    )  # fmt: skip
    return partial(
        training_step,
        engine,
        [random_walks(match.config, match.windows, seed=0)],
        step=1,
        lr=1e-4,
        balance_rate=1e-3,
        objective=NextPatchObjective(error_unit="window", target_clip=10.0),
        series_name=str,
    )


def worker(output: Path, *, rounds: int, there: list[str], threads: int) -> None:
    """Time each match in turns and write what was found."""
    torch.set_num_threads(threads)
    ranks = ranks_module.start()
    keep_freed_memory()  # as runs do
    initialise_deepspeed(ranks, timeout_seconds=600)
    found: dict[str, Any] = {}
    for name, match in MATCHES.items():
        has_peer = match.peer in there
        found[name] = {}
        for precision in ("fp32", "bf16"):
            steps: dict[str, Callable[[], object]] = {
                f"ours, {mode}": our_step(match, mode, precision, ranks)
                for mode in ("sequence", "token")
            }
            flops: dict[str, float] = {
                n: training_flops(match.config, windows=match.windows).total for n in steps
            }
            # In bf16 its fp32 step is kept for comparison: some gain nothing by autocast.
            for kind in ("fp32", FP32_ONEDNN if precision == "fp32" else "bf16"):
                if has_peer:
                    label = f"{match.peer} {kind}"
                    steps[label], flops[label] = peer_step(match, kind)
            turns = take_turns(steps, rounds=rounds, gemm_precision=precision)
            found[name][precision] = summary(match, turns, flops)
    output.write_text(json.dumps(found))
    ranks_module.stop()


def summary(match: Match, turns: Turns, flops: dict[str, float]) -> dict[str, Any]:
    """Put speeds, ratios and shares of one match and precision together."""
    windows = {n: match.windows if n.startswith("ours") else match.peer_windows for n in flops}
    peers = [n for n in flops if not n.startswith("ours")]
    mine = [n for n in flops if n not in peers]
    work = match.windows / match.peer_windows
    return {
        "gemm_gflops_per_core": turns.gemm_gflops(),
        "speed_over": {p: {n: turns.speed_over(n, p, work=work) for n in mine} for p in peers},
        "variants": {
            name: {
                "windows": windows[name],
                "points_per_cpu_second_median": round(
                    windows[name] * CONTEXT / turns.median_cpu(name)
                ),
                "gflop_per_step": round(count / 1e9, 1),
                "gflops_per_cpu_second": round(count / turns.median_cpu(name) / 1e9, 1),
                "share_of_gemm_rate": {
                    gemm: turns.gemm_share(name, count, gemm=gemm) for gemm in (GEMM, GEMM_DEFAULT)
                },
            }
            for name, count in flops.items()
        },
    }


def find_peers() -> tuple[list[str], str]:
    """Return the peers that PEERS holds, and the path that they are imported from.

    Raises:
        SystemExit: if PEERS is set and holds none, naming the files that are missing.
    """
    if not (folder := os.environ.get("PEERS")):
        return [], ""
    root = Path(folder).resolve()
    there = [peer for peer, file in FILES.items() if (root / file).is_file()]
    missing = [str(root / file) for peer, file in FILES.items() if peer not in there]
    if not there:
        raise SystemExit(f"PEERS={folder} holds no clone: missing are {', '.join(missing)}")
    for path in missing:
        print(f"left out, as it is missing: {path}", file=sys.stderr)
    parts = [root / "site", *(root / FILES[peer].split("/")[0] for peer in there)]
    return there, os.pathsep.join(map(str, parts))


def main() -> None:
    """Run the turns in a process that finds the peers first, and record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="one round, to see that all runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    there, path = find_peers()
    if args.worker:
        worker(args.worker, rounds=rounds, there=there, threads=args.threads)
        return
    # Before our own packages: Time-MoE wants an older transformers and what that wants.
    variables = environment() | {"PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT))))}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, *sys.argv, "--worker", str(output)]
        subprocess.run(command, check=True, env=variables)
        found = json.loads(output.read_text())
    results = {"context_length": CONTEXT, "rounds": rounds, "threads": args.threads,
               "peers": there, "matches": found}  # fmt: skip
    if args.quick:
        print(json.dumps(results, indent=1))
        return
    record("peer_steps", results, notes="variants in turns in one process; ratios by CPU time")


if __name__ == "__main__":
    main()
