"""Expert layers alone, without attention or shared experts: ours against others'.

Two parts, each in turns, ratios of CPU time:

- *steps*: two residual layers under DeepSpeed (ZeRO 1, AdamW, clipping), one rank and two with
  experts in parallel; against a dense network of equal active size, DeepSpeed's own layer with and
  without drops, AutoEP, and, with few tokens, the einsum dispatch that DeepSpeed had before;
- *layers*: forward and backward of one layer in one process, without engine or optimizer; against a
  loop over a module per expert, with few large experts and with many small ones.

All multiply float32 matrices by oneDNN, as our training does.

    python benchmarks/expert_layers.py                      # fp32
    python benchmarks/expert_layers.py --precision bf16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from record import record
from step_speed import launch
from step_turns import take_turns
from step_variants import (
    AUTO_EP,
    EINSUM,
    LOOP,
    OURS,
    STOCK,
    STOCK_ALL,
    AutoEPConfig,
    auto_ep_settings,
    twin_layer,
)
from tsmoe import ranks as ranks_module
from tsmoe.engine.deepspeed_engine import expert_factory, initialise_deepspeed
from tsmoe.host_memory import keep_freed_memory
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import ExpertFactory, MoEConfig, MoELayer
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import Ranks

D_MODEL, NUM_LAYERS, PATCHES = 256, 2, 16


@dataclass(frozen=True, kw_only=True)
class Size:
    """Experts of a layer and the tokens of a step and rank."""

    num_experts: int
    top_k: int
    d_ff: int
    tokens: int

    def config(self, mode: str = "token") -> MoEConfig:
        """Return the layer's config for one of our router modes."""
        router = SequenceRouterConfig(mode=mode, top_k=self.top_k)  # type: ignore[arg-type]
        return MoEConfig(
            num_experts=self.num_experts, num_shared_experts=0, d_ff_expert=self.d_ff, router=router
        )


FEW_LARGE = Size(num_experts=8, top_k=2, d_ff=512, tokens=4096)
FEW_TOKENS = Size(num_experts=8, top_k=2, d_ff=512, tokens=1024)
LAYERS = {
    "8 large, 4,096 tokens": FEW_LARGE,
    "32 small, 512 tokens": Size(num_experts=32, top_k=2, d_ff=128, tokens=512),
    "32 small, 4,096 tokens": Size(num_experts=32, top_k=2, d_ff=128, tokens=4096),
    "64 fine, 512 tokens": Size(num_experts=64, top_k=4, d_ff=64, tokens=512),
    "64 fine, 4,096 tokens": Size(num_experts=64, top_k=4, d_ff=64, tokens=4096),
}


class Stack(nn.Module):
    """Residual layers of one variant."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(D_MODEL) for _ in layers)
        self.layers = nn.ModuleList(layers)

    def forward(self, tokens_BCND: Tensor) -> Tensor:
        """Return the mean square of the last layer's output."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens_BCND = tokens_BCND + run_layer(layer, norm(tokens_BCND))
        return tokens_BCND.square().mean()


def run_layer(layer: nn.Module, tokens_BCND: Tensor) -> Tensor:
    """Run a layer of ours or of others."""
    if isinstance(layer, MoELayer):
        return layer(tokens_BCND, None)[0]
    hidden: Tensor = layer(tokens_BCND.flatten(1, 2))  # others know windows and tokens only
    return hidden.reshape(tokens_BCND.shape)


def build_layer(
    variant: str, size: Size, *, ep_size: int = 1, make_experts: ExpertFactory = Experts
) -> nn.Module:
    """Build one layer of ours or of others."""
    if variant not in OURS:
        return twin_layer(variant, size.config(), D_MODEL, ep_size)
    return MoELayer(
        size.config(variant), d_model=D_MODEL, layer_index=0, num_layers=NUM_LAYERS, seed=0,
        make_experts=make_experts,
    )  # fmt: skip


def random_tokens(size: Size, precision: str, *, seed: int) -> Tensor:
    """Make tokens of windows of one variate."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BCND = torch.randn(size.tokens // PATCHES, 1, PATCHES, D_MODEL, generator=generator)
    return tokens_BCND.bfloat16() if precision == "bf16" else tokens_BCND


def step_of(
    variant: str, size: Size, precision: str, ranks: Ranks, make_experts: ExpertFactory
) -> Callable[[], None]:
    """Return a training step of a stack under DeepSpeed."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    torch.manual_seed(0)
    layers = [
        build_layer(variant, size, ep_size=ranks.size, make_experts=make_experts)
        for _ in range(NUM_LAYERS)
    ]
    model = Stack(layers)
    settings = {
        "train_micro_batch_size_per_gpu": size.tokens // PATCHES, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1}, "bf16": {"enabled": precision == "bf16"},
        "steps_per_print": 10**9,
    }  # fmt: skip
    optimizer = None
    if variant == AUTO_EP:
        model.config = AutoEPConfig(size.config(), D_MODEL)  # type: ignore[assignment]
        settings |= auto_ep_settings(ranks.size, pattern=r"layers\.\d+")
    else:
        groups = split([{"name": "all", "params": list(model.parameters())}])
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False,
        model_parameters=None if optimizer else list(model.parameters()),
    )  # fmt: skip
    tokens_BCND = random_tokens(size, precision, seed=ranks.rank)

    @exact_onednn_matmul()
    def step() -> None:
        engine.backward(engine(tokens_BCND))
        engine.step()

    return step


def worker(output: Path, *, rounds: int, precision: str) -> None:
    """Time steps on the ranks of this launch; the first rank writes."""
    ranks = ranks_module.start()
    keep_freed_memory()  # as runs do
    initialise_deepspeed(ranks, timeout_seconds=600)
    make_experts = expert_factory(ranks.size, ranks, zero_stage=1)
    found = {}
    parts: dict[str, tuple[Size, tuple[str, ...]]] = {
        "8 large, 4,096 tokens": (FEW_LARGE, ("dense", STOCK, STOCK_ALL, AUTO_EP))
    }
    if ranks.size == 1:
        parts["8 large, 1,024 tokens"] = (FEW_TOKENS, (EINSUM,))
    for name, (size, twins) in parts.items():
        steps = {
            variant: step_of(variant, size, precision, ranks, make_experts)
            for variant in (*twins, *OURS)
        }
        turns = take_turns(steps, rounds=rounds, warm_up=2, ranks=ranks)
        found[name] = {
            "speed_over": {t: {n: turns.speed_over(n, t) for n in OURS} for t in twins},
            "variants": {n: turns.figures(n, tokens=size.tokens * ranks.size) for n in steps},
        }
    if ranks.is_first:
        output.write_text(json.dumps(found))
    ranks_module.stop()


def time_layers(size: Size, *, rounds: int, precision: str) -> dict[str, Any]:
    """Time forward and backward of single layers in this process."""
    torch.set_num_threads(1)
    tokens_BCND = random_tokens(size, precision, seed=0)
    gradient_BCND = random_tokens(size, precision, seed=1)

    @exact_onednn_matmul()
    def pass_through(layer: nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        run_layer(layer, tokens_BCND.clone().requires_grad_()).backward(gradient_BCND)

    passes = {}
    for variant in ("dense", LOOP, *OURS):
        torch.manual_seed(0)
        layer = build_layer(variant, size)
        if precision == "bf16":
            layer.bfloat16()
        passes[variant] = partial(pass_through, layer)
    turns = take_turns(passes, rounds=rounds, warm_up=2)
    return {
        "num_experts": size.num_experts, "top_k": size.top_k, "d_ff_expert": size.d_ff,
        "tokens": size.tokens,
        "speed_over": {t: {n: turns.speed_over(n, t) for n in OURS} for t in ("dense", LOOP)},
        "variants": {n: turns.figures(n, tokens=size.tokens) for n in passes},
    }  # fmt: skip


def main() -> None:
    """Start the workers with one and with two ranks, time the layers, record what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--quick", action="store_true", help="few rounds, to see that all runs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    if args.worker:
        worker(args.worker, rounds=rounds, precision=args.precision)
        return
    results: dict[str, Any] = {
        "precision": args.precision, "d_model": D_MODEL, "rounds": rounds,
        "layers": {
            name: time_layers(size, rounds=3 * rounds, precision=args.precision)
            for name, size in LAYERS.items()
        },
        "steps": {f"{count}_rank": launch(count, sys.argv[1:]) for count in (1, 2)},
    }  # fmt: skip
    if args.quick:
        print(json.dumps(results, indent=1))
        return
    suffix = "" if args.precision == "fp32" else f"_{args.precision}"
    record(f"expert_layers{suffix}", results, notes="one thread per rank; variants in turns")


if __name__ == "__main__":
    main()
