"""What measuring and recording each step costs, against the same steps without.

The tiny preset's model trains on random walks in three variants that take turns of ten steps (one
interval of the log) inside the same processes: `off` measures and writes nothing at all,
`measured` has meters, marks and what rides on the sum, `recorded` also writes metrics.jsonl and
tensorboard as a run does. What counts are ratios of CPU time, summed over ranks.

    python benchmarks/telemetry.py
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from record import record
from step_speed import launch, random_walks
from step_turns import take_turns
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import CommunicationMeter, Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.record import RunRecord
from tsmoe.train.run_config import RunConfig, resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step
from tsmoe.train.telemetry import StepTelemetry

VARIANTS = ("off", "measured", "recorded")


class Trainer:
    """Trains one variant, ten steps a turn."""

    def __init__(self, variant: str, config: RunConfig, ranks: Ranks) -> None:
        if variant != "off":
            ranks = replace(ranks, meter=CommunicationMeter())
        self.engine: Engine = build_engine(config, ranks, prepare=prepare_pretraining)
        self.telemetry = StepTelemetry(self.engine) if variant != "off" else None
        self.record = None
        if variant == "recorded":
            self.record = RunRecord(config, first_step=0, ranks=ranks)
        self.every = config.training.log_every_steps
        self.batch: WindowBatch = random_walks(
            config.model, config.training.micro_batch_size, seed=ranks.rank
        )
        self.steps_done = 0
        self.own_cpu_seconds = 0.0
        """Spent after the step: reading the meters, working figures out, writing them."""
        self.losses: list[float] = []

    def turn(self) -> None:
        """Do the steps of one interval of the log."""
        for _ in range(self.every):
            begun = time.monotonic()
            if self.telemetry is not None:
                self.telemetry.step_begins()
            report = training_step(
                self.engine,
                [self.batch],
                step=self.steps_done,
                lr=1e-4,
                balance_rate=1e-3,
                objective=NextPatchObjective(error_unit="window", target_clip=10.0),
                series_name=str,
                telemetry=self.telemetry,
            )
            times = {"seconds": time.monotonic() - begun, "seconds_waited": 0.0}
            cpu = time.thread_time()
            if self.telemetry is not None:
                self.telemetry.step_ended(**times)
            if self.record is not None:
                self.record.stepped(self.steps_done, report, self.engine.model.routers(), **times)
            self.own_cpu_seconds += time.thread_time() - cpu
            self.steps_done += 1
            self.losses.append(report.loss)


def worker(output: Path, *, rounds: int, windows: int) -> None:
    """Train the variants in turns on the ranks of this launch; the first writes the figures."""
    torch.set_num_threads(1)
    ranks = ranks_module.start(device="cpu")
    settings = [
        f"run={output.parent / 'run'}", "corpus=unused", f"training.micro_batch_size={windows}",
        f"training.global_batch_size={windows * ranks.size}", "training.steps=100000",
    ]  # fmt: skip
    if ranks.is_first:
        (output.parent / "run").mkdir()
    config = resolve("time_tracker_tiny", settings)
    trainers = {name: Trainer(name, config, ranks) for name in VARIANTS}
    turns = take_turns(
        {name: trainer.turn for name, trainer in trainers.items()}, rounds=rounds, ranks=ranks
    )
    losses = {name: trainer.losses for name, trainer in trainers.items()}
    if ranks.is_first:
        steps = config.training.log_every_steps
        figures: dict[str, Any] = {
            "rounds": rounds,
            "steps_a_round": steps,
            "losses_equal": losses["off"] == losses["measured"] == losses["recorded"],
            "cpu_ms_a_step": {n: round(median(turns.cpu[n]) / steps * 1e3, 3) for n in VARIANTS},
            "cpu_over_off": {n: over_off(turns.cpu, n) for n in VARIANTS[1:]},
            "own_cpu_ms_a_step_after_it": {
                name: round(trainers[name].own_cpu_seconds / trainers[name].steps_done * 1e3, 3)
                for name in VARIANTS[1:]
            },
            "bytes_a_step": {
                path.name: round(size(path) / trainers["recorded"].steps_done)
                for path in sorted((output.parent / "run").iterdir())
            },
        }
        output.write_text(json.dumps(figures))
    ranks_module.stop()


def over_off(cpu: dict[str, list[float]], name: str) -> float:
    """Return the median over rounds of a variant's CPU time over that without telemetry."""
    pairs = zip(cpu[name], cpu["off"], strict=True)
    return round(median(on / off for on, off in pairs), 4)


def size(path: Path) -> int:
    """Count the bytes of a file, or of those in a folder."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    """Start the workers with one and with two ranks and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--windows", type=int, default=64, help="of a rank and step")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, rounds=args.rounds, windows=args.windows)
        return
    arguments = ["--rounds", str(args.rounds), "--windows", str(args.windows)]
    results = {f"{count}_rank": launch(count, arguments) for count in (1, 2)}
    results["preset"] = {"name": "time_tracker_tiny", "windows_per_rank": args.windows}
    record("telemetry", results, notes="one thread per rank; variants in turns")


if __name__ == "__main__":
    main()
