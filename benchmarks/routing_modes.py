"""Routing by sequence, prefix or token, and statistics by window or prefix, in forecasts.

Routing by sequence and window statistics let training look at the future of a token. Each variant
of the tiny preset is trained equally long and evaluated zero-shot; seeds show how much is chance.

    python benchmarks/routing_modes.py --steps 400 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT, record
from runs import corpus, last_validation, pretrain, tsmoe

TABLE = ROOT / "data_pipeline" / "tiny" / "eval_jfk_weather.parquet"
VARIANTS = {
    "routing prefix, norm prefix": ("prefix", "prefix"),
    "routing sequence, norm prefix": ("sequence", "prefix"),
    "routing token, norm prefix": ("token", "prefix"),
    "routing prefix, norm window": ("prefix", "window"),
    "routing sequence, norm window (the paper's)": ("sequence", "window"),
}


def zero_shot(run: Path, table: Path) -> dict[str, float]:
    """Export a run and evaluate it, context 672, horizon 96."""
    output = run / "errors.json"
    tsmoe(["export", str(run), str(run / "package")])
    tsmoe(["evaluate", str(run / "package"), "--data", str(table), "--json", str(output)])
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    ours = next(result for result in results if result["model"] == "tsmoe")
    return {"mse": round(ours["mse"], 4), "mae": round(ours["mae"], 4)}


def main() -> None:
    """Train and evaluate all variants."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    results: dict[str, Any] = {"steps": args.steps, "table": args.table.name}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = corpus(folder / "corpus")
        for label, (routing, norm) in VARIANTS.items():
            results[label] = []
            for seed in args.seeds:
                run = folder / f"{routing}_{norm}_{seed}"
                pretrain(
                    [f"run={run}", f"corpus={built}", f"training.steps={args.steps}",
                     f"seed={seed}", "engine.type=plain", f"model.instance_norm.mode={norm}",
                     f"model.feed_forward.router.mode={routing}"],
                    ranks=1,
                )  # fmt: skip
                found = zero_shot(run, args.table) | {"validation_loss": last_validation(run)}
                results[label].append({"seed": seed} | found)
    record("routing_modes", results, notes="time_tracker_tiny, one process, zero-shot errors")


if __name__ == "__main__":
    main()
