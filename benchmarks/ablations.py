"""Ablations of fine-tuning that the papers call for: one name each, with figures and a picture.

Each case is a few `tsmoe finetune` commands that differ in one thing; the results name them. What
changes the model itself (routing, norm, dense twin, patch length) is trained from scratch on the
table; what changes fine-tuning starts from the package.

    python benchmarks/ablations.py graph --model PACKAGE --data FOLDER
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from record import RESULTS, record
from tsmoe.evaluate.baselines import season_length

MIXED = ["mixing.num_channel_mixed_layers=2"]
# No edges, in training and evaluation: the same windows in the same order as with them.
NO_EDGES = [*MIXED, "mixing.graph.alpha=0.000001"]
SCRATCH = ["training.steps=600", "training.validate_every_steps=50", "stopping.patience=4"]
LONG_CONTEXT = 768
LAG = 24
# Steps that the leading and the following variate sum up: spectra alike, or of other shapes.
LAGGED = {"lagged": (3, 3), "filtered": (1, 6)}
SMALL = [
    "model.d_model=64", "model.num_layers=2", "model.num_heads=2", "model.lookahead_patches=1",
    "model.dropout=0", "training.global_batch_size=16", "training.micro_batch_size=16",
    "training.steps=1500", "training.validate_every_steps=100", "optimizer.lr=0.002",
    "stopping.max_windows=256",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Cases that differ in one thing, on tables."""

    preset: str
    tables: tuple[str, ...]
    cases: dict[str, list[str]]
    """Settings by label."""


def _patches(length: int) -> list[str]:
    return [
        f"model.patch_length={length}",
        f"model.patch_stride={length}",
        f"model.context_length={LONG_CONTEXT}",
        f"model.lookahead_patches={max(1, 96 // length)}",
        *SCRATCH,
    ]


def _alpha(value: float) -> list[str]:
    return [*MIXED, f"mixing.graph.alpha={value}"]


ABLATIONS = {
    "graph": Ablation(
        preset="channel_mixed",
        tables=("weather", "ETTh1"),
        cases={
            "off": NO_EDGES,
            "amplitude": MIXED,
            "coherence": [*MIXED, "mixing.graph.measure=coherence"],
        },
    ),
    "alpha": Ablation(
        preset="channel_mixed",
        tables=("ETTh1",),
        cases={
            **{str(value): _alpha(value) for value in (0.1, 0.3, 0.5, 0.7, 0.9)},
            "learned": [*MIXED, "mixing.graph.is_alpha_learned=true"],
        },
    ),
    "mixed_layers": Ablation(
        preset="channel_mixed",
        tables=("ETTh1",),
        cases={
            "0": NO_EDGES,
            **{str(count): [f"mixing.num_channel_mixed_layers={count}"] for count in (1, 2, 4)},
        },
    ),
    "lag": Ablation(
        preset="from_scratch",
        tables=tuple(LAGGED),
        cases={
            "off": [*NO_EDGES, *SMALL],
            "amplitude": [*MIXED, *SMALL],
            "coherence": [*MIXED, "mixing.graph.measure=coherence", *SMALL],
        },
    ),
    "patch_length": Ablation(
        preset="from_scratch",
        tables=("electricity_6ch",),
        cases={str(length): _patches(length) for length in (16, 32, 48, 96, 192)},
    ),
    "routing": Ablation(
        preset="from_scratch",
        tables=("ETTh1",),
        cases={
            mode: [f"model.feed_forward.router.mode={mode}", *SCRATCH]
            for mode in ("sequence", "prefix", "token")
        },
    ),
    "norm": Ablation(
        preset="from_scratch",
        tables=("ETTh1",),
        cases={
            mode: [f"model.instance_norm.mode={mode}", *SCRATCH] for mode in ("window", "prefix")
        },
    ),
    "dense": Ablation(
        preset="from_scratch",
        tables=("ETTh1",),
        # As many weights as a token passes: the shared expert and two routed ones.
        cases={
            "experts": SCRATCH,
            "dense": ["model.feed_forward={type: dense, d_ff: 512}", *SCRATCH],
        },
    ),
}


def write_lagged(path: Path, spans: tuple[int, int]) -> None:
    """Write three pairs of variates, of which one tells what the other does 24 steps later.

    Both are moving sums of one white noise, over as many steps as `spans` says, so that the past of
    a variate tells little of its own future.
    """
    generator = np.random.default_rng(0)
    rows, pairs, longest = 6000, 3, 48
    columns = {}
    for pair in range(pairs):
        noise = generator.normal(size=rows + LAG + longest)
        for role, span, shift in (("leads", spans[0], LAG), ("follows", spans[1], 0)):
            sums = np.convolve(noise, np.ones(span) / span**0.5, "valid")[longest - span + 1 :]
            columns[f"{role}_{pair}"] = sums[shift:][:rows] + 0.1 * generator.normal(size=rows)
    times = pd.date_range("2024-01-01", periods=rows, freq="h")
    pd.DataFrame({"date": times, **columns}).to_parquet(path, index=False)


def edges_of(run: Path) -> dict[str, float]:
    """Return how often evaluation had the edges within the pairs, and those across pairs."""
    graph = pd.read_csv(run / "graph.csv")
    graph = graph[graph["variate"] != graph["looks_at"]]
    pair, other = (graph[key].str.rpartition("_")[2] for key in ("variate", "looks_at"))
    share = graph["share_of_windows"]
    return {
        "edges_within_pairs": round(float(share[pair == other].mean()), 3),
        "edges_across_pairs": round(float(share[pair != other].mean()), 3),
    }


def table_of(name: str, args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Return a table and the settings that it needs."""
    if name in LAGGED:
        path = args.out / f"{name}.parquet"
        args.out.mkdir(parents=True, exist_ok=True)
        write_lagged(path, LAGGED[name])
        return path, [f"table.prediction_length={LAG}"]
    settings = []
    if name == "weather":
        # A double time stamp and a gap; the published tables take its rows as they stand.
        settings = ["table.ignores_time=true", f"table.season={season_length('10min')}"]
    return args.data / f"{name}.parquet", settings


def run_case(
    ablation: Ablation, label: str, table: str, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune one case, or read what an earlier start found."""
    run = args.out / f"{args.name}-{label}-{table}-{seed}"
    path, needed = table_of(table, args)
    start = [] if ablation.preset == "from_scratch" else [f"model={args.model}"]
    words = [
        "tsmoe", "finetune", ablation.preset, *start, f"data={path}", f"run={run}", f"seed={seed}",
        *needed, *ablation.cases[label], *args.settings,
    ]  # fmt: skip
    if not (run / "DONE").exists():
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    validation = [e for e in found["validation_mse"]["errors"].values() if e is not None]
    scores = found["test"]["results"]
    return {
        "case": label,
        "table": table,
        "seed": seed,
        "command": shlex.join(words),
        "best_step": found["best_step"],
        "handed_over": found["handed_over"],
        "validation_mse": round(min(validation), 4) if validation else None,
        "mse": round(scores[found["handed_over"]]["mse"], 4),
        "mae": round(scores[found["handed_over"]]["mae"], 4),
        "linear_mse": round(scores["linear"]["mse"], 4),
        **(edges_of(run) if table in LAGGED else {}),
    }


def draw(ablation: Ablation, found: list[dict[str, Any]], path: Path) -> None:
    """Draw the test error of each case, a panel per table; points are seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(ablation.tables), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ablation.tables), squeeze=False)[0]
    for axes, table in zip(panels, ablation.tables, strict=True):
        here = [case for case in found if case["table"] == table]
        labels = [label for label in ablation.cases if any(c["case"] == label for c in here)]
        for place, label in enumerate(labels):
            errors = [case["mse"] for case in here if case["case"] == label]
            axes.plot([place] * len(errors), errors, "o", color="#2a6f97", alpha=0.6)
            axes.plot(place, statistics.mean(errors), "_", color="#d1495b", markersize=24)
        axes.axhline(here[0]["linear_mse"], color="0.6", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title(f"{table} (dashed: linear)")
        axes.set_ylabel("test MSE")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Run one ablation, write its figures after each case, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("--model", help="package to start from, where one is")
    parser.add_argument("--data", type=Path, help="folder with ETTh1.parquet ..")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="folder of runs")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all cases")
    args = parser.parse_intermixed_args()
    ablation = ABLATIONS[args.name]
    if ablation.preset != "from_scratch" and args.model is None:
        parser.error("--model is needed: this ablation starts from a package")
    found: list[dict[str, Any]] = []
    for seed in args.seeds.split(","):
        for table in ablation.tables:
            for label in ablation.cases:
                found.append(run_case(ablation, label, table, int(seed), args))
                record(f"ablation_{args.name}", {"cases": found})
    draw(ablation, found, RESULTS / f"ablation_{args.name}.png")


if __name__ == "__main__":
    main()
