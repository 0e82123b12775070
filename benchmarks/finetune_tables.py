"""Fine-tune a package on tables, row by row of the published protocols, and lay the errors out.

Each row of the results is one `tsmoe finetune` command, which the results name; started again, runs
that are done are not repeated. Writes results/finetune_tables.json, and a Markdown table beside it.

    python benchmarks/finetune_tables.py --model PACKAGE --data FOLDER --rows full,few_shot_10
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record
from tsmoe.evaluate.baselines import season_length

TABLES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather")

STRONG = ["optimizer.lr=0.0005", "dropout=0.2", "training.steps=600"]

# Preset and settings of each row, beside model=, data= and run=.
ROWS: dict[str, tuple[str, list[str]]] = {
    "full": ("full", []),
    "few_shot_10": ("full", ["few_shot=0.1"]),
    "few_shot_5": ("full", ["few_shot=0.05"]),
    "scratch": ("from_scratch", ["training.steps=1000"]),
    "scratch_10": ("from_scratch", ["few_shot=0.1", "training.steps=600", "stopping.patience=4"]),
    "head": ("head", []),
    "low_rank": ("low_rank", []),
    "experts": ("full", ["trainable.trains=experts"]),
    "channel_mixed": ("channel_mixed", []),
    "long": ("full", ["training.steps=1000", "optimizer.lr=0.0003", "stopping.patience=6"]),
    "no_mixture": ("full", ["stopping.mixes_with_start=false"]),
    "all_tokens": ("full", ["training.loss_on=all"]),
    "more_dropout": ("full", ["dropout=0.3"]),
    "strong": ("full", STRONG),
    "strong_10": ("full", ["few_shot=0.1", *STRONG]),
    "shortcut": ("full", ["linear_shortcut=learned", *STRONG]),
    "shortcut_10": ("full", ["few_shot=0.1", "linear_shortcut=learned", *STRONG]),
    "fitted": ("full", ["linear_shortcut=least_squares", *STRONG]),
    "fitted_10": ("full", ["few_shot=0.1", "linear_shortcut=least_squares", *STRONG]),
    "bad_lr": ("full", ["optimizer.lr=3.0", "training.steps=60"]),
}

# Mean squared errors 96 steps ahead of other models, as METHODS quotes them from their papers.
PUBLISHED = {
    "Timer-1B, UTSD alone, zero-shot": (0.438, 0.314, 0.690, 0.213, 0.181),
    "PatchTST/64, look-back 512, full": (0.370, 0.274, 0.293, 0.166, 0.149),
    "DLinear, look-back 336, full": (0.375, 0.289, 0.299, 0.167, 0.176),
    "target of this project, full": (0.360, 0.275, 0.285, 0.165, 0.148),
}


def command(row: str, table: Path, run: Path, args: argparse.Namespace, seed: int) -> list[str]:
    """Return the command of one cell."""
    preset, settings = ROWS[row]
    start = [] if preset == "from_scratch" else [f"model={args.model}"]
    # Weather has a double time stamp and a gap; the published tables take its rows as they stand.
    as_it_stands = []
    if table.stem == "weather":
        as_it_stands = ["table.ignores_time=true", f"table.season={season_length('10min')}"]
    lengths = [
        f"table.prediction_length={args.horizon}",
        *([] if args.context is None else [f"table.context_length={args.context}"]),
    ]
    return [
        "tsmoe", "finetune", preset, *start, f"data={table}", f"run={run}", f"seed={seed}",
        *as_it_stands, *lengths, *settings, *args.settings,
    ]  # fmt: skip


def cell(row: str, name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one row on one table with one seed, or read what an earlier start found."""
    run = args.out / f"{row}-{name}-{args.horizon}-{seed}"
    words = command(row, args.data / f"{name}.parquet", run, args, seed)
    begun, seconds = time.monotonic(), run / "seconds.json"
    if not (run / "DONE").exists():
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
        seconds.write_text(json.dumps(round(time.monotonic() - begun)), encoding="utf-8")
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    validation = found["validation_mse"]
    return {
        "table": name,
        "seed": seed,
        "command": shlex.join(words),
        "seconds": json.loads(seconds.read_text(encoding="utf-8")) if seconds.exists() else None,
        "handed_over": found["handed_over"],
        "best_step": found["best_step"],
        "validation_mse": {
            "start": validation["start_error"],
            "best": min((e for e in validation["errors"].values() if e is not None), default=None),
        },
        "test": {
            model: {key: round(errors[key], 4) for key in ("mse", "mae", "mase")}
            for model, errors in found["test"]["results"].items()
        },
    }  # fmt: skip


def handed_over(found: dict[str, Any]) -> dict[str, float]:
    """Return the test errors of what the run handed over."""
    return found["test"][found["handed_over"]]


def markdown(results: dict[str, list[dict[str, Any]]], *, horizon: int) -> str:
    """Lay out one line per row and one column per table: MSE (MAE), with the spread over seeds."""
    tables = list(dict.fromkeys(found["table"] for cells in results.values() for found in cells))
    lines = [f"| | {' | '.join(tables)} |", f"|---|{'---|' * len(tables)}"]
    first = next(iter(results.values()))
    for model in ("zero_shot", "linear", "seasonal_naive", "naive"):
        at = {f["table"]: f["test"][model] for f in first if model in f["test"]}
        lines.append(_line(model, [_errors([at[t]]) if t in at else "" for t in tables]))
    for row, cells in results.items():
        by_table = [[f for f in cells if f["table"] == table] for table in tables]
        texts = []
        for group in by_table:
            kept = " *" if group and group[0]["handed_over"] == "zero_shot" else ""
            texts.append(_errors([handed_over(found) for found in group]) + kept if group else "")
        lines.append(_line(row, texts))
    for name, errors in PUBLISHED.items() if horizon == 96 else ():
        at_table = dict(zip(TABLES, errors, strict=True))
        lines.append(_line(name, [f"{at_table[t]:.3f}" if t in at_table else "" for t in tables]))
    lines.append("")
    lines.append("MSE (MAE) on the test part; * nothing better was learned, the start was kept.")
    return "\n".join(lines) + "\n"


def _line(name: str, texts: list[str]) -> str:
    return f"| {name} | {' | '.join(texts)} |"


def _errors(found: list[dict[str, float]]) -> str:
    mse, mae = ([errors[key] for errors in found] for key in ("mse", "mae"))
    spread = f" ± {statistics.stdev(mse):.4f}" if len(mse) > 1 else ""
    return f"{statistics.mean(mse):.4f}{spread} ({statistics.mean(mae):.4f})"


def main() -> None:
    """Fine-tune all cells and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="package to start from")
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.parquet ..")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--rows", default="full", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--horizon", type=int, default=96)
    parser.add_argument("--context", type=int, help="rows seen (default: the package's)")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of runs")
    parser.add_argument("--name", default="finetune_tables", help="of the result files")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all cells")
    args = parser.parse_intermixed_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for row in args.rows.split(","):
        for name in args.tables.split(","):
            for seed in args.seeds.split(","):
                results.setdefault(row, []).append(cell(row, name, int(seed), args))
                record(
                    args.name, results, notes="one process of one thread; seconds of a whole run"
                )
    path = RESULTS / f"{args.name}.md"
    path.write_text(markdown(results, horizon=args.horizon), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
