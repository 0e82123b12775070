"""What a checkpoint costs the training: written in the background, against at once.

Models of several sizes train on random walks under DeepSpeed, ZeRO 1. In each round the same engine
does some steps three times, in turns: with no checkpoint, with one that is written in the
background as in a run, and with one for which training waits (`begin` and `finish` in a row).
The stall is the time that the first rank spends in the calls that save, as a share of one step;
what a writing thread takes from the steps beside it shows in the time of the whole turn.

    python benchmarks/save_cost.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from record import RESULTS, record
from step_speed import launch, random_walks
from step_turns import take_turns
from tsmoe import ranks as ranks_module
from tsmoe.checkpoint.layout import CheckpointMeta, step_folders
from tsmoe.checkpoint.saver import CheckpointConfig, CheckpointSaver
from tsmoe.config import encode
from tsmoe.engine.build import build_engine
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig, resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

VARIANTS = ("none", "background", "synchronous")
WINDOWS = {"tiny": 64, "mini": 32, "small": 4}
"""Windows of a rank and step by preset: what fits a step of some tenths of a second."""


@dataclass
class Times:
    """Seconds of each checkpoint of a variant, on this rank."""

    copied: list[float] = field(default_factory=list)
    """The copy to host memory alone."""
    stalled: list[float] = field(default_factory=list)
    """All that training waited for, the copy included."""
    visible_after: list[float] = field(default_factory=list)
    """From the start of saving until the checkpoint had its name."""


class Trainer:
    """One engine that does the steps of all variants, and saves between them."""

    def __init__(self, config: RunConfig, ranks: Ranks, *, steps: int) -> None:
        self.engine: Engine = build_engine(config, ranks, prepare=prepare_pretraining)
        self.saver = CheckpointSaver(Path(config.run), CheckpointConfig(keep=1), ranks)
        self.times = {variant: Times() for variant in VARIANTS[1:]}
        self._config, self._ranks, self._steps = config, ranks, steps
        self._batch = random_walks(config.model, config.training.micro_batch_size, seed=ranks.rank)
        self._checkpoints = 0

    def turn(self, variant: str) -> None:
        """Do some steps; after the first one a checkpoint is due, except of `none`."""
        begun, stalled = 0.0, 0.0
        for number in range(self._steps):
            is_any_writing = self._step()
            now = time.perf_counter()
            if self.saver.is_pending and not is_any_writing:
                self.saver.finish()
                self.times[variant].visible_after.append(time.perf_counter() - begun)
            if number == 0 and variant != "none":
                begun = now
                self._begin(self.times[variant])
                if variant == "synchronous":
                    self.saver.finish()
                    self.times[variant].visible_after.append(time.perf_counter() - begun)
            stalled += time.perf_counter() - now
        if variant == "none":
            return
        now = time.perf_counter()
        if self.saver.is_pending:  # a run would wait here if it saved so often
            self.saver.finish()
            self.times[variant].visible_after.append(time.perf_counter() - begun)
        self.times[variant].stalled.append(stalled + time.perf_counter() - now)

    def _begin(self, times: Times) -> None:
        self._checkpoints += 1
        meta = CheckpointMeta(
            step=self._checkpoints, windows_seen=0, config=encode(self._config),
            corpus_fingerprint="none",
        )  # fmt: skip
        begun = time.perf_counter()
        snapshot = self.engine.snapshot()
        times.copied.append(time.perf_counter() - begun)
        self.saver.begin(meta, snapshot)

    def _step(self) -> bool:
        """Do a step as the loop does it; return whether a rank was writing when it began."""
        report = training_step(
            self.engine,
            [self._batch],
            step=1,
            lr=1e-4,
            balance_rate=1e-3,
            objective=NextPatchObjective(error_unit="window", target_clip=10.0),
            series_name=str,
            flags=(self.saver.is_writing,),
        )
        return report.flags[0] > 0


def worker(output: Path, *, presets: Sequence[str], rounds: int, steps: int) -> None:
    """Time all sizes on the ranks of this launch; the first one writes the figures."""
    torch.set_num_threads(1)
    ranks = ranks_module.start(device="cpu")
    figures = {}
    for preset in presets:
        windows = WINDOWS[preset]
        settings = [
            f"run={output.parent / preset}", "corpus=unused", "training.precision=fp32",
            f"training.micro_batch_size={windows}", "training.device=cpu",
            f"training.global_batch_size={windows * ranks.size}",
        ]  # fmt: skip
        config = resolve(f"time_tracker_{preset}", settings)
        trainer = Trainer(config, ranks, steps=steps)
        turns = take_turns(
            {variant: partial(trainer.turn, variant) for variant in VARIANTS},
            rounds=rounds,
            ranks=ranks,
        )
        saved = step_folders(Path(config.run))[-1]
        figures[preset] = {
            "parameters_per_rank": sum(p.numel() for p in trainer.engine.model.parameters()),
            "windows_per_rank": windows,
            "bytes_per_checkpoint": sum(file.stat().st_size for file in saved.iterdir()),
            **summary(trainer.times, turns.wall, steps=steps, warm_up=1),
        }
        trainer.saver.close(must_succeed=True)
        ranks.barrier()
    if ranks.is_first:
        output.write_text(json.dumps(figures))
    ranks_module.stop()


def summary(
    times: dict[str, Times], wall: dict[str, list[float]], *, steps: int, warm_up: int
) -> dict[str, Any]:
    """Put medians over rounds together, and stalls as shares of a step.

    Args:
        times: of each variant that saves; the first `warm_up` are left out.
        wall: seconds of each turn by variant, without those of the warm-up.
        steps: in a turn.
        warm_up: turns that do not count.
    """
    step_seconds = median(wall["none"]) / steps
    found: dict[str, Any] = {"step_seconds": round(step_seconds, 4)}
    for variant, of_variant in times.items():
        stalled = median(of_variant.stalled[warm_up:])
        ratios = [a / b for a, b in zip(wall[variant], wall["none"], strict=True)]
        found[variant] = {
            "stall_seconds": round(stalled, 4),
            "stall_over_step": round(stalled / step_seconds, 3),
            "longest_stall_seconds": round(max(of_variant.stalled[warm_up:]), 4),
            "copy_seconds": round(median(of_variant.copied[warm_up:]), 4),
            "copy_over_step": round(median(of_variant.copied[warm_up:]) / step_seconds, 3),
            "seconds_until_visible": round(median(of_variant.visible_after[warm_up:]), 4),
            "steps_lost_in_all": round((median(ratios) - 1) * steps, 2),
        }
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw the stalls of all sizes as shares of a step."""
    from matplotlib.figure import Figure

    bars = {
        f"{preset}\n{name.replace('_', ' ')}": figures
        for name, presets in results.items()
        for preset, figures in presets.items()
    }
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "copy to host memory alone": ("background", "copy_over_step"),
        "written in the background": ("background", "stall_over_step"),
        "synchronous": ("synchronous", "stall_over_step"),
    }
    for place, (label, (variant, key)) in enumerate(kinds.items()):
        heights = [figures[variant][key] for figures in bars.values()]
        axes.bar([i + 0.27 * (place - 1) for i in range(len(bars))], heights, 0.25, label=label)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("stall of a checkpoint, in steps")
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Start the workers with one and with two ranks and record what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--presets", nargs="+", default=[*WINDOWS], choices=[*WINDOWS])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, presets=args.presets, rounds=args.rounds, steps=args.steps)
        return
    arguments = ["--rounds", str(args.rounds), "--steps", str(args.steps),
                 "--presets", *args.presets]  # fmt: skip
    results = {f"{count}_rank": launch(count, arguments) for count in (1, 2)}
    draw(results, RESULTS / "save_cost.png")
    record(
        "save_cost",
        results,
        notes=f"fp32, ZeRO 1, one thread per rank; {args.rounds} checkpoints of each kind, "
        f"{args.steps} steps a turn; files on the disk of the temporary folder",
    )


if __name__ == "__main__":
    main()
