"""MASE and CRPS in the way of GIFT-Eval: a point head, a quantile head, a package zero-shot.

Models with either head are trained from scratch on each table; the package is taken as it is. Each
is judged by `tsmoe evaluate --protocol gift`, in relation to the seasonal naive forecast. Started
again, what is done is not repeated. Writes results/gift_tables.json and a Markdown table beside it.

    python benchmarks/gift_tables.py --model PACKAGE --data FOLDER --tables ETTh1,ETTh2
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, record

SHORT = ["training.steps=600", "stopping.patience=4"]
HEADS = ("point", "quantile")


def run(words: list[str]) -> str:
    """Run a command of the product and return how it is typed."""
    print(shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    return shlex.join(words)


def cell(model: str, table: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Judge a model, trained first where it is none that was pretrained."""
    data, folder = args.data / f"{table}.parquet", args.out / f"{model}-{table}-{seed}"
    done, package, commands = folder / "cell.json", args.model, []
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    if model in HEADS:
        package = str(folder / "run" / "package")
        commands.append(run([
            "tsmoe", "finetune", "from_scratch", f"data={data}", f"run={folder / 'run'}",
            f"seed={seed}", f"model.head={{type: {model}}}", *SHORT, *args.settings,
        ]))  # fmt: skip
    found = folder / "gift.json"
    commands.append(run([
        "tsmoe", "evaluate", package, "--data", str(data), "--protocol", "gift", "--json",
        str(found),
    ]))  # fmt: skip
    judged = json.loads(found.read_text(encoding="utf-8"))
    result = {
        "model": model,
        "table": table,
        "seed": seed,
        "commands": commands,
        "windows": judged["windows"],
        "season": judged["season"],
        "results": judged["results"],
    }
    done.write_text(json.dumps(result), encoding="utf-8")
    return result


def markdown(cells: list[dict[str, Any]]) -> str:
    """Lay out one line per table and model: both measures, and over those of the seasonal naive."""
    lines = [
        "| | MASE | over seasonal naive | CRPS | over seasonal naive |",
        "|---|---|---|---|---|",
    ]
    for found in cells:
        by_model = {row["model"]: row for row in found["results"]}
        own, naive = by_model["tsmoe"], by_model["seasonal_naive"]
        figures = [f"{own[key]:.4f} | {own[key] / naive[key]:.3f}" for key in ("mase", "crps")]
        lines.append(f"| {found['table']}, {found['model']} | {' | '.join(figures)} |")
    lines += ["", "The last tenth of each table, 96 steps ahead, windows that do not overlap."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge all and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="package that is judged zero-shot")
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.parquet ..")
    parser.add_argument("--tables", default="ETTh1,ETTh2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gift"), help="folder of runs")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for both heads")
    args = parser.parse_intermixed_args()
    cells: list[dict[str, Any]] = []
    for table in args.tables.split(","):
        for model in ("zero_shot", *HEADS):
            cells.append(cell(model, table, args.seed, args))
            record("gift_tables", {"cells": cells}, notes="one process of one thread")
    path = RESULTS / "gift_tables.md"
    path.write_text(markdown(cells), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
