"""Forecast tables zero-shot over contexts and horizons; long horizons are rolled.

Each cell is one `tsmoe evaluate` command, which the results name; cells that are there are not
repeated. Writes results/NAME.json (zero_shot_tables by default) and a Markdown table beside it.
`{table}` in the package's path stands for the table, for packages fine-tuned on each.

    python benchmarks/zero_shot_tables.py --model PACKAGE --data FOLDER --tables ETTh1,exchange_rate
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
from tsmoe.evaluate.baselines import season_length

SHOWN = ("tsmoe", "linear", "seasonal_naive", "naive")


def cell(name: str, context: int, horizon: int, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate one table with one context and horizon, or read what an earlier start found."""
    out = args.out / f"{name}-{context}-{horizon}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    package, file = args.model.replace("{table}", name), args.data / f"{name}.parquet"
    words = [
        "tsmoe", "evaluate", package, "--data", str(file),
        "--context", str(context), "--horizon", str(horizon),
    ]  # fmt: skip
    if name == "weather":
        # A double time stamp and a gap; the published tables take its rows as they stand.
        season = season_length("10min") or 1
        words += ["--ignore-time", "--season", str(season if context >= season else 1)]
    if not out.exists():
        print(shlex.join(words), flush=True)
        full = [sys.executable, "-m", *words, "--json", str(out)]
        subprocess.run(full, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(out.read_text(encoding="utf-8"))
    errors = {
        row["model"]: {key: round(row[key], 4) for key in ("mse", "mae", "mase") if key in row}
        for row in found["results"]
    }
    return {
        "table": name,
        "context": context,
        "horizon": horizon,
        "windows": found["windows"],
        "command": shlex.join(words),
        "errors": errors,
    }


def markdown(cells: list[dict[str, Any]]) -> str:
    """Lay out one line per table, context and horizon: MSE (MAE) of each model."""
    lines = [
        f"| table | context | horizon | {' | '.join(SHOWN)} |",
        f"|---|---|---|{'---|' * len(SHOWN)}",
    ]
    for found in cells:
        errors = [
            f"{found['errors'][name]['mse']:.4f} ({found['errors'][name]['mae']:.4f})"
            for name in SHOWN
        ]
        head = f"| {found['table']} | {found['context']} | {found['horizon']} |"
        lines.append(f"{head} {' | '.join(errors)} |")
    return "\n".join([*lines, "", "MSE (MAE) on the test part; the linear model is fitted."]) + "\n"


def main() -> None:
    """Evaluate all cells and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="package, or PATH/{table}/package")
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.parquet ..")
    parser.add_argument("--tables", default="ETTh1,ETTh2,ETTm1,ETTm2,weather,exchange_rate")
    parser.add_argument("--contexts", default="96,512,672")
    parser.add_argument("--horizons", default="96,192,336,720")
    parser.add_argument("--out", type=Path, default=Path("runs/zero_shot"))
    parser.add_argument("--name", default="zero_shot_tables", help="of the result files")
    args = parser.parse_args()
    cells: list[dict[str, Any]] = []
    for name in args.tables.split(","):
        for context in args.contexts.split(","):
            for horizon in args.horizons.split(","):
                cells.append(cell(name, int(context), int(horizon), args))
                record(args.name, {"cells": cells})
    path = RESULTS / f"{args.name}.md"
    path.write_text(markdown(cells), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
