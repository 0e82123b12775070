"""Routed experts alone, forward and backward: ours against a loop of modules and a dense network.

One process and one thread. The variants take turns; each turn draws a new, uneven routing, as a
step does. `loop` is the expert layer of Time-MoE's code, written anew: a module for each expert,
`torch.where` to find its tokens, `index_add_` to bring them back.

With `--exchange`: two ranks share the experts; rows travel beside the shared experts, or before
them, or in bf16.

    python benchmarks/expert_compute.py
    python benchmarks/expert_compute.py --exchange
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from record import record
from runs import environment
from tsmoe import ranks as ranks_module
from tsmoe.host_memory import keep_freed_memory
from tsmoe.moe.dispatch import run_experts
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import MoEConfig, MoELayer
from tsmoe.moe.plan import plan_dispatch
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.moe.routing import Routing
from tsmoe.nn.feed_forward import SwiGLU
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import CommunicationMeter, PendingRows, Ranks

D_MODEL, TOP_K = 256, 2
# Windows, tokens of each, experts, width of an expert.
CASES = {
    "8 of 512, 8192 tokens": (512, 16, 8, 512),
    "32 of 128, 8192 tokens": (512, 16, 32, 128),
    "128 of 32, 8192 tokens": (512, 16, 128, 32),
    "8 of 512, 896 tokens": (64, 14, 8, 512),
    "32 of 128, 896 tokens": (64, 14, 32, 128),
    "128 of 32, 896 tokens": (64, 14, 128, 32),
}
EXPERTS_OF_A_MODULE_EACH = "loop"
# oneDNN compiles a kernel for each new size; a run has met most of them after some steps.
WARM_UP_TURNS = 6


class ModuleLoop(nn.Module):
    """Experts as modules of their own, one after another."""

    def __init__(self, num_experts: int, d_ff: int) -> None:
        super().__init__()
        shapes = {"gate": (D_MODEL, d_ff), "up": (D_MODEL, d_ff), "down": (d_ff, D_MODEL)}
        self.members = nn.ModuleList(
            nn.ModuleDict({k: nn.Linear(*shape, bias=False) for k, shape in shapes.items()})
            for _ in range(num_experts)
        )

    def forward(self, tokens_BCND: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of the chosen experts' answers."""
        tokens_TD = tokens_BCND.flatten(0, 2)
        weights_TK = routing.weights_BCNK.flatten(0, 2).to(tokens_TD.dtype)
        chosen_TKE = F.one_hot(routing.expert_ids_BCNK.flatten(0, 2), len(self.members))
        summed_TD = torch.zeros_like(tokens_TD)
        for expert, member in enumerate(self.members):
            assert isinstance(member, nn.ModuleDict)
            token_R, place_R = torch.where(chosen_TKE[..., expert])
            rows_RD = tokens_TD[token_R]
            hidden_RF = F.silu(member["gate"](rows_RD)) * member["up"](rows_RD)
            answers_RD = member["down"](hidden_RF) * weights_TK[token_R, place_R, None]
            summed_TD.index_add_(0, token_R, answers_RD)
        return summed_TD.view_as(tokens_BCND)


def draw_routing(windows: int, tokens: int, num_experts: int, *, mode: str, seed: int) -> Routing:
    """Draw decisions that favour some experts, up to several times the load of others."""
    generator = torch.Generator().manual_seed(seed)
    decisions = 1 if mode == "sequence" else tokens
    scores_BCNE = torch.rand(windows, 1, decisions, num_experts, generator=generator)
    tilted_BCNE = scores_BCNE - 0.5 * torch.arange(num_experts) / num_experts
    ids_BCNK = tilted_BCNE.topk(TOP_K, dim=-1).indices
    weights_BCNK = torch.rand(ids_BCNK.shape, generator=generator).requires_grad_()
    return Routing(
        expert_ids_BCNK=ids_BCNK.expand(-1, -1, tokens, -1),
        weights_BCNK=weights_BCNK.expand(-1, -1, tokens, -1),
        scores_BCNE=scores_BCNE,
        load_E=ids_BCNK.flatten().bincount(minlength=num_experts),
        margin=torch.tensor(0.0),
        is_per_sequence=mode == "sequence",
    )


def dispatch(experts: Experts) -> Callable[[Tensor, Routing], Tensor]:
    """Return what a layer does with its experts, with the plan that each step makes."""

    def run(tokens_BCND: Tensor, routing: Routing) -> Tensor:
        plan = plan_dispatch(routing, experts.ranks, layer_index=0)
        return run_experts(tokens_BCND, routing, experts, plan)

    return run


def time_case(case: str, dtype: torch.dtype, *, rounds: int) -> dict[str, Any]:
    """Time all variants of a case in turns; CPU seconds, and ratios to the dense network's."""
    windows, tokens, num_experts, d_ff = CASES[case]
    torch.manual_seed(0)
    sizes = {"d_model": D_MODEL, "d_ff": d_ff, "num_experts": num_experts, "layer_index": 0}
    modules: dict[str, nn.Module] = {
        "dense": SwiGLU(D_MODEL, TOP_K * d_ff),
        EXPERTS_OF_A_MODULE_EACH: ModuleLoop(num_experts, d_ff),
        **{
            compute: Experts(**sizes, num_layers=1, seed=0, compute=compute)  # type: ignore[arg-type]
            for compute in ("auto", "grouped")
        },
    }
    modules["auto, sequences"] = modules["auto"]
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    tokens_BCND = torch.randn(windows, 1, tokens, D_MODEL).to(dtype)
    gradient_BCND = torch.randn_like(tokens_BCND)
    for module in modules.values():
        module.to(dtype)
    for turn in range(rounds + WARM_UP_TURNS):
        for name, module in modules.items():
            mode = "sequence" if "sequences" in name else "token"
            # A routing of its own: oneDNN keeps what it compiled for the sizes of another.
            seed = turn * len(modules) + list(modules).index(name)
            routing = draw_routing(windows, tokens, num_experts, mode=mode, seed=seed)
            run: Any = dispatch(module) if isinstance(module, Experts) else module
            arguments = (tokens_BCND.clone().requires_grad_(), routing)
            module.zero_grad()
            begun = time.process_time()
            run(*arguments[: 1 if name == "dense" else 2]).backward(gradient_BCND)
            if turn >= WARM_UP_TURNS:
                seconds[name].append(time.process_time() - begun)
    flops = windows * tokens * TOP_K * D_MODEL * d_ff * 18  # 3 matrices, 3 products, 2 each
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: {
            "cpu_ms_median": round(1e3 * median, 2),
            "gflop_per_cpu_second": round(flops / median / 1e9, 1),
            "speed_over_dense": round(medians["dense"] / median, 3),
            "speed_over_loop": round(medians[EXPERTS_OF_A_MODULE_EACH] / median, 3),
        }
        for name, median in medians.items()
    }


def exchange_worker(output: Path, *, rounds: int) -> None:
    """Time one expert layer on the ranks of this launch, by the way that rows travel."""
    keep_freed_memory()
    ranks = dataclasses.replace(ranks_module.start(device="cpu"), meter=CommunicationMeter())
    assert ranks.meter is not None
    start = Ranks.start_all_to_all

    def start_and_wait(self: Ranks, *arguments: Any, **settings: Any) -> PendingRows:
        pending = start(self, *arguments, **settings)
        pending.wait()
        return pending

    config = MoEConfig(d_ff_expert=512, d_ff_shared=512, router=SequenceRouterConfig(mode="token"))
    wires = {"beside": None, "before": None, "beside, bf16 wire": torch.bfloat16}
    layers = {}
    for name, wire_dtype in wires.items():
        torch.manual_seed(0)
        own = dataclasses.replace(ranks, wire_dtype=wire_dtype)
        layers[name] = MoELayer(
            config, d_model=D_MODEL, layer_index=0, num_layers=1, seed=0,
            make_experts=lambda own=own, **settings: Experts(**settings, ranks=own),
        )  # fmt: skip
    tokens_BCND = torch.randn(256, 1, 16, D_MODEL)
    gradient_BCND = torch.randn_like(tokens_BCND)
    wall: dict[str, list[float]] = {name: [] for name in layers}
    waited: dict[str, list[float]] = {name: [] for name in layers}
    with exact_onednn_matmul():
        for turn in range(rounds + 3):
            for name, layer in layers.items():
                Ranks.start_all_to_all = start_and_wait if name == "before" else start  # type: ignore[method-assign]
                ranks.barrier()
                ranks.meter.take()
                begun = time.perf_counter()
                layer(tokens_BCND.clone().requires_grad_(), None)[0].backward(gradient_BCND)
                ranks.barrier()
                if turn >= 3:
                    wall[name].append(time.perf_counter() - begun)
                    waited[name].append(
                        sum(r.seconds for r in ranks.meter.take() if r.kind == "all_to_all")
                    )
    if ranks.is_first:
        figures = {
            name: {
                "wall_ms_best": round(1e3 * min(wall[name]), 2),
                "wall_ms_median": round(1e3 * statistics.median(wall[name]), 2),
                "waited_ms_median": round(1e3 * statistics.median(waited[name]), 2),
            }
            for name in layers
        }
        output.write_text(json.dumps(figures))
    ranks_module.stop()


def main() -> None:
    """Time the cases, or the exchange, and record what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--exchange", action="store_true")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        exchange_worker(args.worker, rounds=args.rounds)
        return
    if args.exchange:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "figures.json"
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node=2", __file__, "--rounds", str(args.rounds)]
            subprocess.run([*launch, "--worker", str(output)], check=True, env=environment())
            figures = json.loads(output.read_text())
        record("expert_exchange", figures, notes="2 ranks of one thread, gloo; variants in turns")
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {}
    with exact_onednn_matmul():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            results[name] = {case: time_case(case, dtype, rounds=args.rounds) for case in CASES}
    record("expert_compute", results, notes="one thread; variants in turns, a new routing each")


if __name__ == "__main__":
    main()
