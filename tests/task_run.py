"""Small files for each task and the settings of a run on them, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tsmoe import ranks as ranks_module
from tsmoe.checkpoint.package import load_package
from tsmoe.config import decode, merge_layers
from tsmoe.tasks.config import TaskRunConfig
from tsmoe.tasks.run import train_tasks

Settings = dict[str, Any]

SMALL: Settings = {
    "model": {
        "patch_length": 8,
        "context_length": 32,
        "d_model": 32,
        "num_heads": 4,
        "num_layers": 2,
        "dropout": 0.0,
        "feed_forward": {
            "type": "moe",
            "num_experts": 4,
            "d_ff_expert": 32,
            "d_ff_shared": 32,
            "router": {"type": "recurrent", "d_router": 16, "noise": 0.0},
        },
    },
    "balance_loss": {"alpha": 0.1, "beta": 0.1},
    "training": {
        "steps": 6,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "validate_every_steps": 3,
        "device": "cpu",
        "timeout_seconds": 60,
    },
    "optimizer": {"lr": 3e-3},
    "stopping": {"max_windows": 24},
}
TASKS: dict[str, Settings] = {
    "forecast": {"type": "forecast", "prediction_length": 16},
    "imputation": {"type": "imputation"},
    "anomaly": {"type": "anomaly"},
    "classification": {"type": "classification", "fits_context": False, "head_dropout": 0.0},
}


def write_waves(path: Path, *, rows: int = 400, variates: int = 3) -> Path:
    """Write hourly waves of one day, with noise and a gap."""
    generator = np.random.default_rng(0)
    hours = np.arange(rows)
    values = {
        f"wave {place}": np.sin(2 * np.pi * (hours + 5 * place) / 24)
        + 0.1 * generator.normal(size=rows)
        for place in range(variates)
    }
    values["wave 0"][40:44] = np.nan
    times = pd.date_range("2024-01-01", periods=rows, freq="h")
    pd.DataFrame({"date": times, **values}).to_csv(path, index=False)
    return path


def write_machines(path: Path, *, rows: int = 300) -> Path:
    """Write two machines whose waves stop for a while in the test part."""
    generator = np.random.default_rng(1)
    frames = []
    for machine in ("m1", "m2"):
        wave = np.sin(np.arange(2 * rows) / 5)[:, None] + 0.05 * generator.normal(
            size=(2 * rows, 2)
        )
        labels = np.zeros(2 * rows)
        labels[rows + 100 : rows + 120] = 1
        wave[labels == 1] = 0.0
        frames.append(
            pd.DataFrame(
                {
                    "entity": machine,
                    "split": ["train"] * rows + ["test"] * rows,
                    "f0": wave[:, 0],
                    "f1": wave[:, 1],
                    "label": np.where(np.arange(2 * rows) < rows, np.nan, labels),
                }
            )
        )
    pd.concat(frames).to_parquet(path, index=False)
    return path


def write_shapes(path: Path, *, cases: int = 20, is_uneven: bool = True) -> Path:
    """Write slow and fast waves of two channels, of lengths from 20 to 32."""
    generator = np.random.default_rng(2)
    rows: Settings = {"split": [], "label": [], "dims": []}
    for split in ("train", "test"):
        for number in range(cases):
            label = ("slow", "fast")[number % 2]
            length = int(generator.integers(20, 33)) if is_uneven else 32
            period = {"slow": 16, "fast": 4}[label]
            phase = generator.uniform(0, period)
            wave = np.sin(2 * np.pi * (np.arange(length) + phase) / period)
            channels = np.stack((wave, -wave)) + 0.1 * generator.normal(size=(2, length))
            rows["split"].append(split)
            rows["label"].append(label)
            rows["dims"].append(channels.astype(np.float32).tolist())
    pq.write_table(pa.table(rows), path)
    return path


def write_files(folder: Path) -> dict[str, Path]:
    """Write a file for each task."""
    waves = write_waves(folder / "waves.csv")
    return {
        "forecast": waves,
        "imputation": waves,
        "anomaly": write_machines(folder / "machines.parquet"),
        "classification": write_shapes(folder / "shapes.parquet"),
    }


def small_run(run: Path, files: dict[str, Path], *settings: Settings) -> TaskRunConfig:
    """Put tasks on their files, and settings on top of `SMALL`."""
    tasks = {name: {**TASKS[name], "path": str(path)} for name, path in files.items()}
    return decode(
        TaskRunConfig, merge_layers(SMALL, {"run": str(run), "tasks": tasks}, *settings),
        origin="test",
    )  # fmt: skip


def train_all(configs: list[TaskRunConfig]) -> list[Settings | None]:
    """Train one after the other; the first rank returns losses, errors and weights."""
    found: list[Settings | None] = []
    for config in configs:
        _, result = train_tasks(config)
        found.append(None if result is None else what_came(Path(config.run)))
    ranks_module.stop()
    return found


def what_came(run: Path) -> Settings:
    """Read losses by step, the result and the weights of a run."""
    model, card = load_package(run / "package")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss/train"] for line in lines if "loss/train" in line],
        "loads": [line["experts"]["load"] for line in lines if "loss/train" in line],
        "result": json.loads((run / "result.json").read_text()),
        "card": card,
        "weights": {name: p.detach().numpy().copy() for name, p in model.named_parameters()},
    }
