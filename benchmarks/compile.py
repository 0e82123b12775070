"""What compiling the blocks buys in a training step, and after how many steps it has paid.

Plain and compiled models train in turns inside one process, so that a busy machine slows both
alike. Compilation is timed from an empty cache, compilers' own processes included; a second run on
the same machine finds the cache filled.

    python benchmarks/compile.py
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from record import record
from runs import environment
from step_turns import take_turns
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.engine.build import build_engine
from tsmoe.engine.plain_engine import PlainEngineConfig
from tsmoe.engine.protocol import Engine
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig, resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

TINY, SMALL = "time_tracker_tiny", "time_tracker_small"
WIDE = ("model.d_model=256", "model.feed_forward.d_ff_expert=256",
        "model.feed_forward.d_ff_shared=512")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its passes."""

    preset: str
    windows: int
    precision: str
    settings: tuple[str, ...] = ()

    def config(self) -> RunConfig:
        """The run, on one process without DeepSpeed."""
        sizes = (f"training.micro_batch_size={self.windows}",
                 f"training.global_batch_size={self.windows}",
                 f"training.precision={self.precision}")  # fmt: skip
        config = resolve(self.preset, [*self.settings, *sizes])
        return replace(config, engine=PlainEngineConfig())


CASES = {
    "tiny preset, fp32": Case(preset=TINY, windows=64, precision="fp32"),
    "tiny preset at d_model 256, fp32": Case(
        preset=TINY, windows=256, precision="fp32", settings=WIDE
    ),
    "tiny preset at d_model 256, bf16": Case(
        preset=TINY, windows=256, precision="bf16", settings=WIDE
    ),
    "small preset, bf16": Case(preset=SMALL, windows=64, precision="bf16"),
}


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def made_up_batch(config: RunConfig, ranks: Ranks) -> WindowBatch:
    """Random walks of the length of a window."""
    windows = config.training.micro_batch_size
    generator = torch.Generator().manual_seed(0)
    values_BCL = torch.randn(windows, 1, config.model.window_length, generator=generator)
    values_BCL = values_BCL.cumsum(-1).to(ranks.device)
    is_true = torch.ones_like(values_BCL, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BCL, observed_BCL=is_true, is_target_BCL=is_true,
        series_ids_B=torch.zeros(windows, dtype=torch.int64, device=ranks.device),
    )  # fmt: skip


def one_step(config: RunConfig, engine: Engine, batch: WindowBatch) -> float:
    """Do a step and return its loss."""
    return training_step(
        engine,
        [batch],
        step=0,
        lr=1e-4,
        balance_rate=1e-3,
        objective=NextPatchObjective(
            error_unit=config.training.error_unit, target_clip=config.training.target_clip
        ),
        series_name=str,
    ).loss


def worker(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one case; torch.compile's cache must be empty."""
    ranks = ranks_module.start()
    config = case.config()
    batch = made_up_batch(config, ranks)
    engines, first_loss, first_step = {}, {}, {}
    for name, compiles in (("plain", False), ("compiled", True)):
        training = replace(config.training, compiles_blocks=compiles)
        engine = build_engine(
            replace(config, training=training), ranks, prepare=prepare_pretraining
        )
        wall, cpu = time.perf_counter(), cpu_seconds()
        first_loss[name] = one_step(config, engine, batch)
        first_step[name] = time.perf_counter() - wall, cpu_seconds() - cpu
        engines[name] = engine
    turns = take_turns(
        {name: partial(one_step, config, engine, batch) for name, engine in engines.items()},
        rounds=rounds,
        ranks=ranks,
    )
    plain, compiled = (turns.median_cpu(name) for name in ("plain", "compiled"))
    wall, cpu = (after - before for before, after in zip(*first_step.values(), strict=True))
    saved = plain - compiled
    return {
        "plain_cpu_seconds_per_step": round(plain, 4),
        "compiled_cpu_seconds_per_step": round(compiled, 4),
        "speed_over_plain": turns.speed_over("compiled", "plain"),
        "compile_wall_seconds": round(wall, 1),
        "compile_cpu_seconds": round(cpu, 1),
        "steps_until_it_has_paid": round(cpu / saved) if saved > 0 else None,
        "first_loss": first_loss,
    }


def main() -> None:
    """Run each case in a process with an empty cache and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.output.write_text(json.dumps(worker(CASES[args.worker], args.rounds)))
        return
    results = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "figures.json"
            command = [sys.executable, __file__, "--rounds", str(args.rounds)]
            command += ["--worker", name, "--output", str(output)]
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
            subprocess.run(command, check=True, env=environment() | cache)
            results[name] = json.loads(output.read_text())
    record("compile", results, notes="one thread; plain and compiled in turns")


if __name__ == "__main__":
    main()
