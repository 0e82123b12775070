"""Expert layers alone: ours against DeepSpeed's own and a dense network of equal active size.

Two residual layers without attention or shared experts: d_model 256, 8 experts of width 512, top-2,
8,192 tokens a step and rank, ZeRO 1, AdamW, clipping. The variants take turns inside the same
processes; CPU time is summed over ranks.

    python benchmarks/expert_layers.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from record import record
from runs import environment
from tsmoe import ranks as ranks_module
from tsmoe.engine.deepspeed_engine import expert_factory, initialise_deepspeed
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.feed_forward import SwiGLU

D_MODEL, D_FF, NUM_EXPERTS, TOP_K, NUM_LAYERS = 256, 512, 8, 2, 2
SEQUENCES, TOKENS = 512, 16
CAPACITY = 1.25
OURS = ("token", "prefix", "sequence")


class Stack(nn.Module):
    """Residual layers of one variant."""

    def __init__(self, variant: str, make_experts: Any, ep_size: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D_MODEL) for _ in range(NUM_LAYERS))
        self.layers = nn.ModuleList(
            _layer(variant, index, make_experts, ep_size) for index in range(NUM_LAYERS)
        )

    def forward(self, tokens_BCND: Tensor) -> Tensor:
        """Return the mean square of the last layer's output."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if isinstance(layer, MoELayer):
                hidden_BCND, _, _ = layer(norm(tokens_BCND), None)
            else:
                hidden_BCND = layer(norm(tokens_BCND))
                hidden_BCND = hidden_BCND[0] if isinstance(hidden_BCND, tuple) else hidden_BCND
            tokens_BCND = tokens_BCND + hidden_BCND
        return tokens_BCND.square().mean()


def _layer(variant: str, index: int, make_experts: Any, ep_size: int) -> nn.Module:
    if variant == "dense":
        return SwiGLU(D_MODEL, TOP_K * D_FF)
    if variant == "stock":
        from deepspeed.moe.layer import MoE

        return MoE(
            D_MODEL, SwiGLU(D_MODEL, D_FF), num_experts=NUM_EXPERTS, ep_size=ep_size, k=TOP_K,
            capacity_factor=CAPACITY,
        )  # fmt: skip
    config = MoEConfig(
        num_experts=NUM_EXPERTS,
        num_shared_experts=0,
        d_ff_expert=D_FF,
        router=SequenceRouterConfig(mode=variant, top_k=TOP_K),  # type: ignore[arg-type]
    )
    return MoELayer(
        config, d_model=D_MODEL, layer_index=index, num_layers=NUM_LAYERS, seed=0,
        make_experts=make_experts,
    )  # fmt: skip


def worker(output: Path, *, rounds: int, precision: str) -> None:
    """Time the variants in turns on the ranks of this launch; the first rank writes."""
    ranks = ranks_module.start()
    initialise_deepspeed(ranks, timeout_seconds=600)
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    make_experts = expert_factory(ranks.size, ranks)
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }  # fmt: skip
    engines = {}
    for variant in ("dense", "stock", *OURS):
        torch.manual_seed(0)
        model = Stack(variant, make_experts, ranks.size)
        groups = split([{"name": "all", "params": list(model.parameters())}])
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-4)
        engines[variant], *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
    generator = torch.Generator().manual_seed(ranks.rank)
    tokens_BCND = torch.randn(SEQUENCES, 1, TOKENS, D_MODEL, generator=generator)
    if precision == "bf16":
        tokens_BCND = tokens_BCND.bfloat16()
    wall: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 2):
        for name, engine in engines.items():
            ranks.barrier()
            begun, cpu_begun = time.perf_counter(), time.process_time()
            engine.backward(engine(tokens_BCND))
            engine.step()
            ranks.barrier()
            spent = torch.tensor(time.process_time() - cpu_begun, dtype=torch.float64)
            total = float(ranks.sum(spent))
            if turn >= 2:  # the first turns warm up
                wall[name].append(time.perf_counter() - begun)
                cpu[name].append(total)
    if ranks.is_first:
        tokens = SEQUENCES * TOKENS * ranks.size
        figures = {
            name: {
                "tokens_per_second_best": round(tokens / min(wall[name])),
                "tokens_per_cpu_second_best": round(tokens / min(cpu[name])),
                "tokens_per_cpu_second_median": round(tokens / statistics.median(cpu[name])),
            }
            for name in engines
        }
        output.write_text(json.dumps(figures))
    ranks_module.stop()


def main() -> None:
    """Start the workers with one and with two ranks and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, rounds=args.rounds, precision=args.precision)
        return
    results: dict[str, Any] = {"precision": args.precision, "stock_capacity": CAPACITY}
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "figures.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += [f"--nproc_per_node={count}", __file__, *sys.argv[1:]]
            subprocess.run([*launch, "--worker", str(output)], check=True, env=environment())
            figures = json.loads(output.read_text())
        speed = {name: values["tokens_per_cpu_second_median"] for name, values in figures.items()}
        results[f"{count}_rank"] = {
            "variants": figures,
            "ratios": {
                f"{ours}_over_{twin}": round(speed[ours] / speed[twin], 3)
                for ours in OURS
                for twin in ("dense", "stock")
            },
        }
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    record(f"expert_layers{suffix}", results, notes="one thread per rank; variants in turns")


if __name__ == "__main__":
    main()
