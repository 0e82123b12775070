"""A small package, a small table and the settings of a fine-tuning run on them, for tests."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tsmoe import ranks as ranks_module
from tsmoe.checkpoint.package import load_package, save_package
from tsmoe.config import decode, merge_layers
from tsmoe.finetune.config import FinetuneConfig
from tsmoe.finetune.loop import finetune
from tsmoe.heads import QuantileHeadConfig
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

Settings = dict[str, Any]

SMALL_MODEL = TimeTrackerConfig(
    patch_length=16,
    patch_stride=16,
    context_length=64,
    lookahead_patches=2,
    d_model=32,
    num_layers=2,
    num_heads=2,
    feed_forward=MoEConfig(num_experts=4, d_ff_expert=32, d_ff_shared=32),
)

SMALL: Settings = {
    "table": {"prediction_length": 32},
    "training": {
        "steps": 6,
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "validate_every_steps": 2,
        "device": "cpu",
        "timeout_seconds": 60,
    },
    "optimizer": {"lr": 3e-3},
    "stopping": {"max_windows": 32},
}

HOURS_A_DAY = 24


def write_table(path: Path, *, rows: int = 500, gaps: bool = False) -> Path:
    """Write hourly waves a, b and c, of which c is b some hours later, and `hour`, a calendar."""
    generator = np.random.default_rng(0)
    hours = np.arange(rows)
    # Steps that come at random and last: what only a variate that leads can tell.
    lead = np.repeat(generator.normal(size=rows // 8 + 1), 8)[:rows]
    values = {
        "a": 10 * np.sin(2 * np.pi * hours / HOURS_A_DAY) + generator.normal(size=rows),
        "b": lead + 0.05 * generator.normal(size=rows),
        "c": 5 + 2 * np.roll(lead, 16) + 0.05 * generator.normal(size=rows),
        "hour": (hours % HOURS_A_DAY).astype(float),
    }
    if gaps:
        values["a"][50:70] = values["b"][200:203] = np.nan
    times = pd.date_range("2024-01-01", periods=rows, freq="h")
    pd.DataFrame({"date": times, **values}).to_csv(path, index=False)
    return path


def write_package(folder: Path, *, has_quantiles: bool = False) -> Path:
    """Write a package of random weights, whose attention looks at others as at itself."""
    model = SMALL_MODEL
    if has_quantiles:
        model = replace(model, head=QuantileHeadConfig())
    save_package(folder, build_model(model, seed=3), {"step": 0})
    return folder


def small_finetune(
    run: Path, table: Path, *settings: Settings, start: Path | None
) -> FinetuneConfig:
    """Put settings on top of `SMALL`."""
    paths: Settings = {"run": str(run), "table": {"path": str(table)}}
    if start is not None:
        paths["start"] = str(start)
    return decode(FinetuneConfig, merge_layers(SMALL, paths, *settings), origin="test")


def finetune_all(configs: list[FinetuneConfig]) -> list[dict[str, Any] | None]:
    """Fine-tune one after the other; the first rank returns errors by step, and weights."""
    found = []
    for config in configs:
        _, result = finetune(config)
        found.append(None if result is None else _what_came(config))
    ranks_module.stop()
    return found


def _what_came(config: FinetuneConfig) -> dict[str, Any]:
    import json

    run = Path(config.run)
    result = json.loads((run / "result.json").read_text())
    model, card = load_package(run / "package")
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    losses = [line["loss/train"] for line in map(json.loads, lines) if "loss/train" in line]
    return {"result": result, "card": card, "weights": weights, "losses": losses}


def same_start(found: dict[str, Any], package: Path) -> dict[str, bool]:
    """Say of each weight whether it is still that of the package."""
    model, _ = load_package(package)
    return {
        name: torch.equal(p.detach(), torch.from_numpy(found["weights"][name]))
        for name, p in model.named_parameters()
    }
