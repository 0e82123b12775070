"""What readers of PatchMoE ask: one name each, with figures and a picture.

    python benchmarks/patch_moe_checks.py sweep --table ETTh1.parquet           # alpha and beta
    python benchmarks/patch_moe_checks.py specialisation --table ETTh1.parquet  # tasks on one table
    python benchmarks/patch_moe_checks.py similarity --table ETTh1.parquet      # CKA of layers
    python benchmarks/patch_moe_checks.py router_cost                           # GRU against linear

`specialisation` and `similarity` share their runs: forecast and imputation, two seeds each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.table import read_table
from record import RESULTS, record
from tsmoe.batch import WindowBatch
from tsmoe.evaluate.protocol import fit_scaler, ltsf_borders
from tsmoe.heads.task import ForecastHeadConfig
from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.moe.balance_loss import BalanceLossConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import LinearRouterConfig, RecurrentRouterConfig, RouterConfig
from tsmoe.ranks import Ranks
from tsmoe.tasks.objective import TaskObjective
from tsmoe.tasks.predictor import load_predictor

SWEEP = (0.0, 0.001, 0.01, 0.1, 1.0)
TASKS = ("forecast", "imputation")
SEEDS = (0, 1)
# Windows, patches and layers alike for both tasks, so that routing can be compared.
ALIKE = {
    "forecast": [
        "model.patch_length=48",
        "model.norms_first=false",
        "tasks.forecast.shortcut=null",
        "tasks.forecast.loss=mse",
    ],
    "imputation": ["model.patch_length=48", "model.context_length=336"],
}
WINDOWS = 64


def train(preset: str, run: Path, table: Path, settings: list[str]) -> dict[str, Any]:
    """Train, or read what an earlier start found."""
    words = ["tsmoe", "finetune", preset, f"data={table}", f"run={run}", *settings]
    if not (run / "DONE").exists():
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {"command": shlex.join(words), **result}


def test_windows(table: Path, length: int) -> Tensor:
    """Return some windows of the test part, scaled by the train part."""
    values_LC = read_table(table).values_LC
    borders = ltsf_borders(str(table), len(values_LC))
    names = tuple(map(str, range(values_LC.shape[1])))
    scaler = fit_scaler(values_LC[: borders.train_end], names, path=str(table))
    part_LC = scaler.scale(values_LC[borders.validation_end - length : borders.test_end])
    windows_BCL = np.lib.stride_tricks.sliding_window_view(part_LC, length, axis=0)
    places = np.linspace(0, len(windows_BCL) - 1, WINDOWS).astype(int)
    return torch.from_numpy(np.ascontiguousarray(windows_BCL[places]))


@torch.inference_mode()
def answers(package: Path, values_BCL: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return loads by variate of each layer, normed, and the tokens after each layer."""
    model = load_predictor(package).model
    tokens: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, output: tokens.append(output[0].flatten(0, 2)))
        for block in model.blocks
    ]
    shown = values_BCL.isfinite()
    output = model(torch.where(shown, values_BCL, 0), shown)
    for hook in hooks:
        hook.remove()
    loads = []
    for routing in output.routings:
        chosen = torch.zeros(routing.scores_BCNE.shape).scatter(-1, routing.expert_ids_BCNK, 1.0)
        loads.append(chosen.mean((0, 2)) / routing.expert_ids_BCNK.shape[-1])
    return loads, tokens


def sweep(args: argparse.Namespace) -> None:
    """Train with each pair of alpha and beta; draw the error over what the load does."""
    cells = []
    for alpha, beta in itertools.product(SWEEP, SWEEP):
        run = args.out / f"sweep-{args.table.stem}-{alpha}-{beta}"
        weights = [f"balance_loss.alpha={alpha}", f"balance_loss.beta={beta}"]
        found = train("patch_moe_forecast", run, args.table, [*weights, *args.settings])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
        last = [line["experts"] for line in lines if "loss/train" in line][-20:]
        cells.append(
            {
                "alpha": alpha,
                "beta": beta,
                "command": found["command"],
                "mse": found["test"]["forecast"]["results"][0]["mse"],
                "load_entropy": float(np.mean([step["load_entropy"] for step in last])),
                "live_experts": float(np.mean([step["live_experts"] for step in last])),
                "margin": float(np.mean([step["margin"] for step in last])),
            }
        )
        record("patch_moe_sweep", {"table": args.table.stem, "cells": cells},
               notes="entropy of the load over its maximum, live experts and the router's margin: "
               "means over layers of the last 20 steps")  # fmt: skip
    draw_sweep(cells)


def draw_sweep(cells: list[dict[str, Any]]) -> None:
    """Draw error, entropy and margin over both weights."""
    figure, panels = _panels(3)
    for axes, key in zip(panels, ("mse", "load_entropy", "margin"), strict=True):
        grid = np.array([cell[key] for cell in cells]).reshape(len(SWEEP), len(SWEEP))
        image = axes.imshow(grid, origin="lower", cmap="viridis")
        for (row, column), value in np.ndenumerate(grid):
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", color="w", size=7)
        axes.set_xticks(range(len(SWEEP)), [f"{beta:g}" for beta in SWEEP])
        axes.set_yticks(range(len(SWEEP)), [f"{alpha:g}" for alpha in SWEEP])
        axes.set_xlabel("beta")
        axes.set_ylabel("alpha")
        axes.set_title({"mse": "test MSE", "load_entropy": "entropy of the load",
                        "margin": "margin of the choice"}[key])  # fmt: skip
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(RESULTS / "patch_moe_sweep.png", dpi=110, metadata={"Software": None})


def task_runs(args: argparse.Namespace) -> dict[tuple[str, int], Path]:
    """Train each task with each seed on the same table."""
    runs = {}
    for task, seed in itertools.product(TASKS, SEEDS):
        run = args.out / f"alike-{args.table.stem}-{task}-{seed}"
        train(f"patch_moe_{task}", run, args.table, [*ALIKE[task], f"seed={seed}", *args.settings])
        runs[task, seed] = run / "package"
    return runs


def specialisation(args: argparse.Namespace) -> None:
    """Compare which experts tasks use with which ones two seeds of one task use.

    Experts have no names: those of two runs are matched by what they are used for (the permutation
    with the least distance), so that only the pattern of use counts.
    """
    loads = {key: answers(package, test_windows(args.table, 336))[0]
             for key, package in task_runs(args).items()}  # fmt: skip
    distances = {}
    for first, second in itertools.combinations(loads, 2):
        by_layer = [
            pattern_distance(a, b) for a, b in zip(loads[first], loads[second], strict=True)
        ]
        distances[f"{first[0]} {first[1]} - {second[0]} {second[1]}"] = by_layer
    within = [
        d for name, d in distances.items() if len({p.split()[0] for p in name.split(" - ")}) == 1
    ]
    between = [
        d for name, d in distances.items() if len({p.split()[0] for p in name.split(" - ")}) == 2
    ]
    record(
        "patch_moe_specialisation",
        {
            "table": args.table.stem,
            "distance_by_layer": distances,
            "mean_between_tasks": np.mean(between, axis=0).tolist(),
            "mean_between_seeds": np.mean(within, axis=0).tolist(),
        },
        notes="Jensen-Shannon distance of loads by variate, experts matched; 0 equal, 1 disjoint",
    )
    layers = len(next(iter(loads.values())))
    figure, panels = _panels(len(loads) * layers, rows=layers)
    for axes, (layer, (key, found)) in zip(
        panels, itertools.product(range(layers), loads.items()), strict=True
    ):
        axes.imshow(found[layer], vmin=0, vmax=1, cmap="magma", aspect="auto")
        axes.set_title(f"{key[0]}, seed {key[1]}, layer {layer + 1}", size=8)
        axes.set_xlabel("expert")
        axes.set_ylabel("variate")
    figure.savefig(RESULTS / "patch_moe_specialisation.png", dpi=110, metadata={"Software": None})


def pattern_distance(first_CE: Tensor, second_CE: Tensor) -> float:
    """Return the least mean Jensen-Shannon distance over all ways to match experts."""
    best = math.inf
    for order in itertools.permutations(range(first_CE.shape[1])):
        best = min(best, _jensen_shannon(first_CE, second_CE[:, list(order)]))
    return best


def _jensen_shannon(first_CE: Tensor, second_CE: Tensor) -> float:
    mean_CE = (first_CE + second_CE) / 2
    parts = [
        torch.xlogy(share_CE, share_CE / mean_CE.clamp(min=1e-12)).sum(-1)
        for share_CE in (first_CE, second_CE)
    ]
    divergence_C = (parts[0] + parts[1]) / (2 * math.log(2))
    return float(divergence_C.clamp(min=0).sqrt().mean())


def similarity(args: argparse.Namespace) -> None:
    """Compare the layers of runs by linear CKA (arXiv 1905.00414)."""
    tokens = {
        f"{task} {seed}, layer {layer + 1}": found
        for (task, seed), package in task_runs(args).items()
        for layer, found in enumerate(answers(package, test_windows(args.table, 336))[1])
    }
    names = list(tokens)
    grid = np.array([[linear_cka(tokens[a], tokens[b]) for b in names] for a in names])
    record("patch_moe_similarity", {"table": args.table.stem, "layers": names,
                                    "cka": grid.round(4).tolist()})  # fmt: skip
    figure, (axes,) = _panels(1, width=6.0)
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90, size=7)
    axes.set_yticks(range(len(names)), names, size=7)
    axes.set_title("linear CKA of tokens after each layer")
    figure.colorbar(image, ax=axes, shrink=0.8)
    figure.savefig(RESULTS / "patch_moe_similarity.png", dpi=110, metadata={"Software": None})


def linear_cka(first_TD: Tensor, second_TD: Tensor) -> float:
    """Return the similarity of two representations of the same tokens: 1 equal up to rotation."""
    first_TD, second_TD = (x.double() - x.double().mean(0) for x in (first_TD, second_TD))
    cross = torch.linalg.matrix_norm(first_TD.T @ second_TD).square()
    own = [torch.linalg.matrix_norm(x.T @ x) for x in (first_TD, second_TD)]
    return float(cross / (own[0] * own[1]))


def router_cost(args: argparse.Namespace) -> None:
    """Time a training step and an answer with each router, in turns, and count what they keep."""
    routers: dict[str, RouterConfig] = {
        "linear": LinearRouterConfig(),
        "linear_noise": LinearRouterConfig(noise=1.0),
        "recurrent_64": RecurrentRouterConfig(d_router=64),
        "recurrent_128": RecurrentRouterConfig(d_router=128),
        "recurrent_128_per_layer": RecurrentRouterConfig(d_router=128, shares_memory=False),
    }
    models = {name: _model(router) for name, router in routers.items()}
    batch = _batch()
    seconds: dict[str, dict[str, list[float]]] = {n: {"step": [], "answer": []} for n in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            for kind, work in (("step", _step), ("answer", _answer)):
                begun = time.process_time()
                work(model, batch)
                seconds[name][kind].append(time.process_time() - begun)
    results = {}
    for name, model in models.items():
        router = [p.numel() for n, p in model.named_parameters() if ".router." in n]
        results[name] = {
            **{f"{kind}_ms": 1000 * float(np.median(times[1:])) for kind, times in
               seconds[name].items()},
            "router_parameters": sum(router),
            "parameters": sum(p.numel() for p in model.parameters()),
            "kept_mib": _kept_bytes(model, batch) / 2**20,
        }  # fmt: skip
    for kind in ("step_ms", "answer_ms", "kept_mib"):
        for found in results.values():
            found[f"{kind}_over_linear"] = found[kind] / results["linear"][kind]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record("patch_moe_router_cost", results, notes=f"32 windows of 7 variates and 14 patches, "
           f"width 128, 2 layers; CPU time, medians of {args.rounds} turns; kept for the backward "
           f"pass; peak of the process {peak} MiB")  # fmt: skip
    figure, panels = _panels(2)
    for axes, key in zip(panels, ("step_ms_over_linear", "kept_mib_over_linear"), strict=True):
        axes.barh(list(results), [found[key] for found in results.values()], color="#2a6f97")
        axes.axvline(1, color="0.5", linewidth=1)
        axes.set_title(key.replace("_", " "))
    figure.savefig(RESULTS / "patch_moe_router_cost.png", dpi=110, metadata={"Software": None})


def _model(router: RouterConfig) -> PatchMoE:
    config = PatchMoEConfig(
        feed_forward=replace(MoEConfig(num_experts=4, d_ff_shared=128), router=router),
        heads={"forecast": ForecastHeadConfig(prediction_length=96)},
    )
    return PatchMoE(config)


def _batch() -> WindowBatch:
    generator = torch.Generator().manual_seed(0)
    values_BCL = torch.randn(32, 7, 336 + 96, generator=generator)
    is_ahead_BCL = (torch.arange(336 + 96) >= 336).expand(values_BCL.shape)
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=~is_ahead_BCL,
        is_target_BCL=is_ahead_BCL,
        series_ids_B=torch.zeros(32, dtype=torch.int64),
    )


def _step(model: PatchMoE, batch: WindowBatch) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    _loss(model, batch).backward()


def _loss(model: PatchMoE, batch: WindowBatch) -> Tensor:
    objective = TaskObjective(balance=BalanceLossConfig())
    terms = objective.loss(model, model(**model.arguments(batch)), batch, ranks=Ranks())
    assert terms.regulariser is not None
    return terms.error_B.mean() + terms.regulariser


@torch.inference_mode()
def _answer(model: PatchMoE, batch: WindowBatch) -> None:
    model.eval()
    model(**model.arguments(batch))


def _kept_bytes(model: PatchMoE, batch: WindowBatch) -> int:
    """Count bytes of tensors that the backward pass waits for, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _loss(model, batch)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(size for place, size in kept.items() if place not in weights)
    del loss
    return total


def _panels(count: int, *, rows: int = 1, width: float = 3.8) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = -(-count // rows)
    figure = Figure(figsize=(width * columns, width * 0.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


CHECKS = {
    "sweep": sweep,
    "specialisation": specialisation,
    "similarity": similarity,
    "router_cost": router_cost,
}


def main() -> None:
    """Run one check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--table", type=Path, help="a benchmark table")
    parser.add_argument("--out", type=Path, default=Path("runs/patch_moe"), help="folder of runs")
    parser.add_argument("--rounds", type=int, default=15, help="turns of router_cost")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all runs")
    args = parser.parse_intermixed_args()
    if args.check != "router_cost" and args.table is None:
        parser.error("--table is needed for this check")
    CHECKS[args.check](args)


if __name__ == "__main__":
    main()
