"""How many experts are in use after training, with the load bias and without it.

Trains the tiny preset on the embedded corpus and sums each layer's load over the last 50 steps. An
expert is live if it gets at least a quarter of the mean load.

    python benchmarks/expert_utilisation.py --steps 300
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from record import record
from runs import corpus, last_validation, pretrain, steps
from tsmoe.train.metrics import expert_metrics

_LAST_STEPS = 50


def utilisation(run: Path) -> dict[str, Any]:
    """Describe the loads of the last steps of a run."""
    loads_SME = torch.tensor([values["experts"]["load"] for values in steps(run)][-_LAST_STEPS:])
    found = expert_metrics(loads_SME.sum(0))
    return {
        "live_experts_mean": sum(found["live_experts"]) / len(found["live_experts"]),
        "live_experts_by_layer": found["live_experts"],
        "load_entropy_by_layer": [round(value, 4) for value in found["load_entropy"]],
        "validation_loss": round(last_validation(run), 4),
    }


def main() -> None:
    """Train with and without the bias, in the routing modes of interest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--modes", nargs="+", default=["prefix", "sequence"])
    args = parser.parse_args()
    results: dict[str, Any] = {"steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = corpus(folder / "corpus")
        for mode in args.modes:
            for label, rate in (("with bias", "1e-3"), ("without bias", "0")):
                run = folder / f"{mode}_{rate}"
                pretrain(
                    [f"run={run}", f"corpus={built}", f"training.steps={args.steps}",
                     "engine.type=plain", f"model.feed_forward.router.mode={mode}",
                     f"balance.rate={rate}"],
                    ranks=1,
                )  # fmt: skip
                results[f"{mode}, {label}"] = utilisation(run)
    record("expert_utilisation", results, notes="time_tracker_tiny, last 50 steps, 1 process")


if __name__ == "__main__":
    main()
