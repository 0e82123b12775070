"""What packing short series into shared windows gains, on real series shorter than a window.

A small model is trained on the same corpus with and without packs, in turns inside one process, so
that a busy machine slows both alike; what counts are the ratios. Then the price of the mask alone:
the same full windows with and without it.

    python benchmarks/packing.py --tables ../shared/data/corpus
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.shards.reader import Corpus
from record import record
from runs import tsmoe
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.data.loader import DataConfig, TrainingBatches, ValidationBatches
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.windows import WindowIndex, training_windows, validation_windows
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.engine.plain_engine import PlainEngine
from tsmoe.models import build_model
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import StepReport, training_step, validation_loss

TABLES = ("planetlab_cpu", "cmapss_engines", "hospital_carparts", "montevideo_bus")
TARGET_CLIP = 10.0


def model_config(patch_length: int, context_length: int, d_model: int) -> TimeTrackerConfig:
    """A small model with windows of this geometry."""
    return TimeTrackerConfig(
        patch_length=patch_length, patch_stride=patch_length, context_length=context_length,
        d_model=d_model, num_layers=4, num_heads=4,
        feed_forward=MoEConfig(d_ff_expert=d_model, d_ff_shared=2 * d_model),
    )  # fmt: skip


class Training:
    """A model in training, on packs or not."""

    def __init__(self, corpus: Corpus, config: TimeTrackerConfig, windows: int, *, is_packed: bool):
        self.ranks = ranks_module.start(device="cpu")
        model = build_model(config)
        prepare_pretraining(model)
        self.engine = PlainEngine(model, OptimizerConfig(), precision="fp32", ranks=self.ranks)
        index = index_of(corpus, config)
        packs = pack_gather(corpus, index, config) if is_packed else None
        self.batches = TrainingBatches(
            corpus, index, DataConfig(packs_short_series=is_packed), seed=0, packs=packs,
            global_batch_size=windows, micro_batch_size=windows, ranks=self.ranks,
        )  # fmt: skip
        validation = ValidationBatches(
            corpus, validation_windows(corpus, **lengths(config)), max_windows=512,
            batch_size=64, ranks=self.ranks, packs=packs,
        )  # fmt: skip
        self.validation = [validation[item] for item in range(len(validation))]
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.points: list[int] = []
        self.is_used: list[float] = []

    def step(self, number: int) -> StepReport:
        """Cut a batch and take a step, timed as one."""
        begun, cpu_begun = time.perf_counter(), time.process_time()
        batch = self.batches[number]
        report = take_step(self.engine, batch, number)
        self.wall.append(time.perf_counter() - begun)
        self.cpu.append(time.process_time() - cpu_begun)
        self.points.append(report.num_points)
        length = self.engine.model.config.context_length
        self.is_used.append(float(batch.observed_BCL[..., :length].float().mean()))
        return report

    def validate(self) -> float:
        """Mean error on windows of one series each."""
        return validation_loss(
            self.engine,
            self.validation,
            objective=NextPatchObjective(error_unit="window", target_clip=TARGET_CLIP),
        )

    def figures(self) -> dict[str, Any]:
        """Medians over the steps but the first two."""
        wall, cpu = (statistics.median(times[2:]) for times in (self.wall, self.cpu))
        points = statistics.mean(self.points[2:])
        return {
            "observed_share_of_context": round(statistics.mean(self.is_used[2:]), 4),
            "points_forecast_per_step": round(points),
            "seconds_per_step": round(wall, 4),
            "cpu_seconds_per_step": round(cpu, 4),
            "points_per_cpu_second": round(points / cpu),
        }


def take_step(engine: PlainEngine, batch: WindowBatch, number: int) -> StepReport:
    """Train on one batch."""
    return training_step(
        engine,
        [batch],
        step=number,
        lr=1e-3,
        balance_rate=1e-3,
        objective=NextPatchObjective(error_unit="window", target_clip=TARGET_CLIP),
        series_name=str,
    )


def lengths(config: TimeTrackerConfig) -> dict[str, int]:
    """What an index of windows is made for."""
    return {"window_length": config.window_length, "patch_length": config.patch_length}


def index_of(corpus: Corpus, config: TimeTrackerConfig) -> WindowIndex:
    """All training windows, each of one series."""
    return training_windows(corpus, stride=1, **lengths(config))


def pack_gather(corpus: Corpus, index: WindowIndex, config: TimeTrackerConfig) -> PackGather:
    """Pack the short series."""
    return PackGather(
        corpus, index, seed=0, patch_length=config.patch_length, patch_stride=config.patch_stride
    )


def in_turns(runs: dict[str, Training], steps: int, validate_every: int) -> dict[str, Any]:
    """Train all, a step each in turn; validate now and then."""
    curves: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(steps):
        for name, run in runs.items():
            run.step(number)
            if (number + 1) % validate_every == 0:
                curves[name].append(
                    {
                        "step": number + 1,
                        "cpu_seconds": round(sum(run.cpu), 1),
                        "validation_loss": round(run.validate(), 4),
                    }
                )
    figures = {name: run.figures() for name, run in runs.items()}
    plain, packed = figures["plain"], figures["packed"]
    goal = min(point["validation_loss"] for point in curves["plain"])
    reached = [point for point in curves["packed"] if point["validation_loss"] <= goal]
    return figures | {
        "packed_over_plain": {key: round(packed[key] / plain[key], 2) for key in plain},
        "packed_reaches_the_best_of_plain": reached[0] if reached else None,
        "validation": curves,
    }


def price_of_the_mask(config: TimeTrackerConfig, windows: int, rounds: int) -> dict[str, Any]:
    """Time steps on the same full windows, with a mask that says one series each, and without."""
    model = build_model(config)
    prepare_pretraining(model)
    engine = PlainEngine(
        model, OptimizerConfig(), precision="fp32", ranks=ranks_module.start(device="cpu")
    )
    values_BCL = torch.randn(windows, 1, config.window_length).cumsum(-1)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    count = (config.context_length - config.patch_length) // config.patch_stride + 1
    plain = WindowBatch(
        values_BCL=values_BCL, observed_BCL=is_true, is_target_BCL=is_true,
        series_ids_B=torch.arange(windows),
    )  # fmt: skip
    series_BCN = torch.arange(windows)[:, None, None].expand(-1, 1, count).contiguous()
    batches = {"without": plain, "with": replace(plain, series_BCN=series_BCN)}
    cpu: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(rounds + 2):
        for name, batch in batches.items():
            begun = time.process_time()
            take_step(engine, batch, turn)
            if turn > 1:
                cpu[name].append(time.process_time() - begun)
    medians = {name: statistics.median(times) for name, times in cpu.items()}
    return {
        "cpu_seconds_per_step": {name: round(value, 4) for name, value in medians.items()},
        "with_over_without": round(medians["with"] / medians["without"], 3),
    }


def geometry(corpus: Corpus, config: TimeTrackerConfig) -> dict[str, Any]:
    """How many windows there are, with packs and without."""
    index = index_of(corpus, config)
    begun = time.process_time()
    packs = pack_gather(corpus, index, config).packs
    seconds = time.process_time() - begun
    slots = -(-index.ends[packs.members] // config.patch_length)
    return {
        "series": corpus.num_series,
        "shorter_than_a_window": len(packs.members),
        "no_longer_than_a_patch_and_not_used": index.unusable_series,
        "windows": index.num_windows,
        "windows_with_packs": packs.index.num_windows,
        "slots_used_of_packs": round(
            float(slots.sum()) * config.patch_length / config.window_length / len(packs.heads), 4
        ),
        "seconds_to_pack": round(seconds, 4),
    }


def main() -> None:
    """Build the corpus, train in turns and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="folder of Parquet files")
    parser.add_argument("--windows", type=int, default=32, help="of a step")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--d-model", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "tables": TABLES, "windows": args.windows, "steps": args.steps, "d_model": args.d_model
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            {"type": "parquet", "path": str((args.tables / f"{name}.parquet").resolve())}
            for name in TABLES
        ]
        config_file = Path(folder) / "corpus.yaml"
        config_file.write_text(yaml.safe_dump({"sources": sources, "clean": {"min_length": 32}}))
        tsmoe(["data", "build", str(config_file), "--out", f"{folder}/corpus"])
        corpus = Corpus.open(f"{folder}/corpus")
        for patch_length, context_length in ((96, 2880), (48, 672)):
            config = model_config(patch_length, context_length, args.d_model)
            runs = {
                name: Training(corpus, config, args.windows, is_packed=name == "packed")
                for name in ("plain", "packed")
            }
            results[f"context {context_length}, patches of {patch_length}"] = {
                **geometry(corpus, config),
                **in_turns(runs, args.steps, max(1, args.steps // 12)),
                "mask_alone": price_of_the_mask(config, args.windows, rounds=12),
            }
    record("packing", results, notes="one thread, one process; plain and packed in turns")


if __name__ == "__main__":
    main()
