"""A small corpus, a small model and the steps of a run on it, for tests of engines and commands.

The corpus has two sources, gaps, and series shorter than a window, so that windows differ in the
number of points that count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.build import build_corpus
from data_pipeline.config import CorpusConfig
from data_pipeline.shards.reader import Corpus
from data_pipeline.sources.csv import CsvSource
from data_pipeline.steps.clean import CleanConfig
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import Snapshot
from tsmoe.config import decode, merge_layers
from tsmoe.data.loader import TrainingBatches
from tsmoe.data.pack_gather import PackGather
from tsmoe.data.windows import training_windows
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import Ranks
from tsmoe.train.loop import seed_step
from tsmoe.train.metrics import load_biases
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import StepReport, training_step
from tsmoe.train.telemetry import StepTelemetry

Settings = dict[str, Any]

SMALL: Settings = {
    "run": "unused",
    "model": {
        "patch_length": 16,
        "patch_stride": 16,
        "context_length": 64,
        "d_model": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward": {
            "type": "moe",
            "num_experts": 4,
            "d_ff_expert": 32,
            "d_ff_shared": 32,
            "router": {"type": "sequence", "mode": "prefix", "top_k": 2},
        },
    },
    # Clipping is at work in every step: the norm of the gradient stays above 1 here.
    "optimizer": {"lr": 2e-3, "clip_grad_norm": 0.1},
    "training": {
        "steps": 8,
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "device": "cpu",
        "timeout_seconds": 60,
        "validate_every_steps": 4,
    },
    "checkpoint": {"every_steps": 4, "keep": 2},
    "engine": {"type": "plain"},
}


def write_tables(folder: Path, *, spike: float | None = None) -> None:
    """Write the two CSV files of the corpus; `spike` stands in one series again and again."""
    generator = np.random.default_rng(0)
    hours = np.arange(400)
    waves = [
        np.sin(2 * np.pi * hours / period) + 0.1 * generator.normal(size=400)
        for period in (12, 24, 36, 80)
    ]
    walks = [generator.normal(size=60 if i == 3 else 300).cumsum() for i in range(4)]
    for series in (waves[1], walks[2]):
        series[generator.random(len(series)) < 0.25] = np.nan
    if spike is not None:
        waves[0][20::30] = spike
    for name, columns in (("waves", waves), ("walks", walks)):
        for number, values in enumerate(columns):
            rows = "".join(f"{value:.6g}\n" for value in values)
            path = folder / name / f"{name}_{number}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"value\n{rows}")


def build_small_corpus(folder: Path, *, spike: float | None = None) -> Path:
    """Build the corpus and return its folder."""
    write_tables(folder / "tables", spike=spike)
    sources = [
        CsvSource(path=str(folder / "tables" / name / "*.csv"), source=name)
        for name in ("waves", "walks")
    ]
    clean = CleanConfig(min_length=32, max_missing_fraction=0.5)
    build_corpus(CorpusConfig(sources=sources, clean=clean), folder / "corpus")
    return folder / "corpus"


def small_config(corpus: Path, *layers: Settings) -> RunConfig:
    """Put layers of settings over those of the small run."""
    return decode(RunConfig, merge_layers(SMALL, {"corpus": str(corpus)}, *layers), origin="test")


@dataclass(frozen=True, kw_only=True)
class StepsRun:
    """What some steps of a run gave on one rank, as plain data."""

    reports: list[StepReport]
    bias_ME: torch.Tensor
    """Load biases of this rank's copy of the model."""
    snapshot: Snapshot
    """What this rank would write."""

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]

    @property
    def grad_norms(self) -> list[float]:
        return [report.grad_norm for report in self.reports]


def run_steps(config: RunConfig) -> StepsRun:
    """Join the ranks, build the engine and do the steps of the config. For `run_on_ranks`."""
    engine = start_engine(config)
    reports = [one_step(config, engine, step) for step in range(config.training.steps)]
    return StepsRun(
        reports=reports, bias_ME=load_biases(engine.model.routers()), snapshot=engine.snapshot()
    )


def start_engine(config: RunConfig) -> Engine:
    """Join the ranks and build the engine. Collective."""
    ranks = ranks_module.start(timeout_seconds=config.training.timeout_seconds, device="cpu")
    return build_engine(config, ranks, prepare=prepare_pretraining)


def one_step(
    config: RunConfig,
    engine: Engine,
    step: int,
    *,
    micro_batches: Sequence[WindowBatch] | None = None,
    telemetry: StepTelemetry | None = None,
) -> StepReport:
    """Do one step as the training loop does it, with a balance rate that does not rest."""
    ranks = engine.ranks
    if micro_batches is None:
        micro_batches = step_batches(config, ranks, step)
    seed_step(config.seed, step, ranks.rank)
    return training_step(
        engine,
        micro_batches,
        step=step,
        lr=config.optimizer.lr,
        balance_rate=config.balance.rate,
        objective=NextPatchObjective(
            error_unit=config.training.error_unit, target_clip=config.training.target_clip
        ),
        series_name=str,
        telemetry=telemetry,
    )


def step_batches(config: RunConfig, ranks: Ranks, step: int) -> list[WindowBatch]:
    """Return this rank's micro-batches of a step."""
    corpus = Corpus.open(config.corpus)
    lengths = {
        "window_length": config.model.window_length,
        "patch_length": config.model.patch_length,
    }
    index = training_windows(corpus, stride=config.data.window_stride, **lengths)
    packs = None
    if config.data.packs_short_series:
        packs = PackGather(
            corpus,
            index,
            seed=config.seed,
            patch_length=config.model.patch_length,
            patch_stride=config.model.patch_stride,
        )
    batches = TrainingBatches(
        corpus,
        index,
        config.data,
        seed=config.seed,
        packs=packs,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.training.micro_batch_size,
        ranks=ranks,
    )
    passes = config.training.gradient_accumulation_steps(ranks.size)
    return [batches[step * passes + number] for number in range(passes)]


def merge_snapshots(runs: Sequence[StepsRun]) -> dict[str, torch.Tensor]:
    """Put the parts of all ranks together, by key."""
    return {
        key: tensor
        for run in runs
        for tensors in run.snapshot.values()
        for key, tensor in tensors.items()
    }
