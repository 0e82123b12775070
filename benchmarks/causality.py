"""How much the last patch of a context moves what earlier tokens predict.

Zero for routing by prefix or token with prefix statistics; not so for routing by sequence or for
window statistics, which look at the whole context.

    python benchmarks/causality.py --package runs/first/package
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from record import record
from tsmoe.checkpoint.package import load_package
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig


def with_modes(model: TimeTracker, routing: str, norm: str) -> TimeTracker:
    """Return the same weights with other modes of routing and instance norm."""
    config: TimeTrackerConfig = model.config
    feed_forward = config.feed_forward
    assert isinstance(feed_forward, MoEConfig)
    router = replace(feed_forward.router, mode=routing)  # type: ignore[arg-type]
    changed = build_model(
        replace(
            config,
            feed_forward=replace(feed_forward, router=router),
            instance_norm=replace(config.instance_norm, mode=norm),  # type: ignore[arg-type]
        )
    )
    changed.load_state_dict(model.state_dict())
    return changed.eval()


@torch.no_grad()
def movement(model: TimeTracker, windows: int) -> dict[str, float]:
    """Replace the last patch of random walks and compare the predictions of earlier tokens."""
    torch.manual_seed(0)
    config = model.config
    values_BCL = torch.randn(windows, 1, config.context_length).cumsum(-1)
    changed_BCL = values_BCL.clone()
    changed_BCL[..., -config.patch_length :] += 3 * values_BCL.std()
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    outputs = [model(values, is_true) for values in (values_BCL, changed_BCL)]
    before, after = (
        (o.prediction_BCNPK[..., 0] * o.statistics.scale_BCN1 + o.statistics.loc_BCN1)[:, :, :-1]
        for o in outputs
    )
    spread = before.std().item()
    return {
        "largest_movement": (after - before).abs().max().item(),
        "mean_movement_over_spread": (after - before).abs().mean().item() / spread,
    }


def main() -> None:
    """Measure all combinations of modes on the weights of a package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    model, _ = load_package(args.package)
    assert isinstance(model, TimeTracker)
    results: dict[str, Any] = {
        f"routing {routing}, norm {norm}": movement(with_modes(model, routing, norm), args.windows)
        for norm in ("prefix", "window")
        for routing in ("prefix", "token", "sequence")
    }
    record("causality", results, notes="random walks; last patch raised by three spreads")


if __name__ == "__main__":
    main()
