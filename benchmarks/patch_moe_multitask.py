"""One PatchMoE for forecasts and gaps of a table, against one for each of the two.

Each case is one `tsmoe finetune FILE.yaml` command over the preset `patch_moe_multitask`; a model
of one task takes as many steps as that task gets beside the other. Started again, runs that are
done are not repeated. Writes results/patch_moe_multitask.json and a Markdown table beside it.

    python benchmarks/patch_moe_multitask.py --tables ETTh1,ETTh2 --data FOLDER --seeds 0,1,2
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from record import RESULTS, record
from tsmoe.config import merge_layers, parse_override
from tsmoe.train.run_config import FINE_TUNING, read_preset

CASES = ("together", "no_embedding", "forecast", "imputation")
FIGURES = {"forecast": "mse", "imputation": "masked_mse"}


def settings_of(case: str, settings: list[str]) -> dict[str, Any]:
    """Return the settings of a case over the preset."""
    preset = read_preset("patch_moe_multitask", FINE_TUNING)
    values = merge_layers(preset, *(parse_override(text) for text in settings))
    if case in values["tasks"]:
        values["tasks"] = {case: values["tasks"][case]}
        values["model"]["has_task_embedding"] = False
        values["training"]["steps"] //= len(preset["tasks"])
    elif case == "no_embedding":
        values["model"]["has_task_embedding"] = False
    return values


def run_case(case: str, table: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one case, or read what an earlier start found."""
    run = args.out / f"{case}-{table}-{seed}"
    file = args.out / f"{case}.yaml"
    args.out.mkdir(parents=True, exist_ok=True)
    values = settings_of(case, args.settings)
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    data = args.data / f"{table}.parquet"
    words = ["tsmoe", "finetune", str(file), f"data={data}", f"run={run}", f"seed={seed}"]
    if not (run / "DONE").exists():
        print(shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(run / "checkpoints")
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        "case": case,
        "table": table,
        "seed": seed,
        "command": shlex.join(words),
        "settings": values,
        "best_step": found["best_step"],
        "validation_error": min(
            error for error in found["validation_error"]["errors"].values() if error is not None
        ),
        "errors": {
            task: statistics.mean(
                row[figure] for row in found["test"][task]["results"] if row["model"] == "tsmoe"
            )
            for task, figure in FIGURES.items()
            if task in found["test"]
        },
    }


def markdown(cells: list[dict[str, Any]]) -> str:
    """Lay out one line per table and task, one column per kind of model."""
    lines = [
        "| | one model for both | without task embedding | a model for each |",
        "|---|---|---|---|",
    ]
    for table in dict.fromkeys(cell["table"] for cell in cells):
        for task in FIGURES:
            texts = []
            for case in ("together", "no_embedding", task):
                errors = [
                    cell["errors"][task]
                    for cell in cells
                    if (cell["case"], cell["table"]) == (case, table)
                ]
                spread = f" ± {statistics.stdev(errors):.4f}" if len(errors) > 1 else ""
                texts.append(f"{statistics.mean(errors):.4f}{spread}" if errors else "")
            lines.append(f"| {table}, {task} | {' | '.join(texts)} |")
    lines += ["", "Test MSE of forecasts 96 steps ahead, and of hidden points over four shares."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train all cases and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with ETTh1.parquet ..")
    parser.add_argument("--tables", default="ETTh1,ETTh2")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/multitask"), help="folder of runs")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="over the preset")
    args = parser.parse_intermixed_args()
    cells: list[dict[str, Any]] = []
    for table in args.tables.split(","):
        for seed in args.seeds.split(","):
            for case in args.cases.split(","):
                cells.append(run_case(case, table, int(seed), args))
                record("patch_moe_multitask", {"cells": cells}, notes="one process of one thread")
    path = RESULTS / "patch_moe_multitask.md"
    path.write_text(markdown(cells), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
