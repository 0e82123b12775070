"""How a training step's time and memory grow with experts, context, variates and micro-batch.

The points of a curve take turns in one process of one thread, so that a busy machine slows all
alike; CPU seconds count. Memory is the highest resident set of a fresh process over what it had
before model and batch were made. Experts grow at a fixed active size: a token still passes two.

    python benchmarks/cost_curves.py            # all curves
    python benchmarks/cost_curves.py --quick    # fewer points, one round
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from record import record
from tsmoe.batch import WindowBatch
from tsmoe.engine.build import build_engine
from tsmoe.losses import next_patch_loss, target_patches
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.nn.patch import num_patches
from tsmoe.ranks import Ranks
from tsmoe.train.run_config import RunConfig
from tsmoe.train.stages import prepare_pretraining

BALANCING_PASSES = 40


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model and a batch."""

    name: str
    model: TimeTrackerConfig
    windows: int
    variates: int = 1
    neighbours: int | None = None
    """Variates that each looks at, itself among them; None: no graph."""


def model(d_model: int, *, layers: int = 4, experts: int = 8, **settings: Any) -> TimeTrackerConfig:
    """A small Time Tracker with patches of 48 points and two experts a token."""
    feed_forward = MoEConfig(num_experts=experts, d_ff_expert=d_model, d_ff_shared=2 * d_model)
    defaults = {"patch_length": 48, "patch_stride": 48, "context_length": 672}
    return TimeTrackerConfig(
        d_model=d_model, num_layers=layers, num_heads=4, feed_forward=feed_forward,
        **defaults | settings,
    )  # fmt: skip


def curves(*, quick: bool) -> dict[str, list[Point]]:
    """The points of each curve; all but the micro-batch's have about equally many tokens."""
    every = 2 if quick else 1
    experts = [
        Point(name=str(count), model=model(256, experts=count), windows=128)
        for count in (4, 8, 16, 32, 64, 128)[::every]
    ]
    # What grows with experts is reading weights and writing gradients, whatever the tokens.
    experts_of_many = [
        Point(name=str(count), model=model(256, experts=count), windows=512)
        for count in ((8, 128) if quick else (8, 32, 128))
    ]
    contexts = [
        Point(
            name=str(length),
            model=model(256, patch_length=96, patch_stride=96, context_length=length),
            windows=1920 * 96 // length,
        )
        for length in (480, 960, 2880, 5760, 11520)[::every]
    ]
    variates = [
        Point(name=str(count), model=model(128, layers=2, num_channel_mixed_layers=2),
              windows=max(1, 862 // count),
              variates=count, neighbours=min(8, count))
        for count in (1, 7, 21, 137, 321, 862)[::every]
    ]  # fmt: skip
    micro_batches = [
        Point(name=str(count), model=model(256), windows=count)
        for count in (1, 4, 16, 64, 256)[::every]
    ]
    return {
        "experts": experts,
        "experts_512_windows": experts_of_many,
        "context": contexts,
        "variates": variates,
        "micro_batch": micro_batches,
    }


class Trainee:
    """A point's model, optimizer and batch."""

    def __init__(self, point: Point, *, balances: bool) -> None:
        self.point = point
        config = RunConfig(run="unused", corpus="unused", model=point.model)
        # Graphs are for models that mix variates, which pretraining does not.
        prepare = prepare_pretraining if point.neighbours is None else _leave_as_it_is
        self.engine = build_engine(config, Ranks(), prepare=prepare)
        self.batch = _random_walks(point)
        self.adjacency_BCC = None if point.neighbours is None else _random_graph(point)
        if balances:
            self._balance()

    def step(self) -> tuple[float, float]:
        """Take a step; return CPU seconds of forward and backward pass, and of the optimizer."""
        begun = time.process_time()
        config = self.point.model
        target, is_target = target_patches(
            self.batch, patch_length=config.patch_length, patch_stride=config.patch_stride
        )
        length = config.context_length
        output = self.engine.model(
            self.batch.values_BCL[..., :length],
            self.batch.observed_BCL[..., :length],
            self.adjacency_BCC,
        )
        term = next_patch_loss(
            self.engine.model.head, output, target, is_target, error_unit="window", target_clip=10.0
        )
        self.engine.backward(term.error_B.sum() / is_target.sum(), last_micro_batch=True)
        passed = time.process_time()
        self.engine.update(lr=1e-5)
        return passed - begun, time.process_time() - passed

    def imbalance(self) -> float:
        """Load of the fullest expert over the mean, averaged over layers."""
        with torch.no_grad():
            routings = self._routings()
        loads = torch.stack([routing.load_E.double() for routing in routings])
        return float((loads.amax(1) / loads.mean(1)).mean())

    def _balance(self) -> None:
        """Let the load biases do what they do in a run: else most experts would stand idle."""
        with torch.no_grad():
            for number in range(BALANCING_PASSES):
                routings = self._routings()
                for router, routing in zip(self.engine.model.routers(), routings, strict=True):
                    router.balance.update(routing.load_E, rate=0.03 * 0.9**number)

    def _routings(self) -> Sequence[Any]:
        few, length = slice(0, 32), self.point.model.context_length
        values_BCL = self.batch.values_BCL[few, :, :length]
        return self.engine.model(values_BCL, self.batch.observed_BCL[few, :, :length]).routings


def _leave_as_it_is(_: TimeTracker) -> None:
    pass


def _random_walks(point: Point) -> WindowBatch:
    shape = (point.windows, point.variates, point.model.window_length)
    generator = torch.Generator().manual_seed(0)
    values_BCL = torch.randn(shape, generator=generator).cumsum(-1)
    observed_BCL = torch.ones(shape, dtype=torch.bool)
    return WindowBatch(
        values_BCL=values_BCL,
        observed_BCL=observed_BCL,
        is_target_BCL=observed_BCL,
        series_ids_B=torch.zeros(point.windows, dtype=torch.int64),
    )


def _random_graph(point: Point) -> Tensor:
    """Each variate looks at itself and at others, drawn at random: graphs are not banded."""
    count, neighbours = point.variates, point.neighbours
    assert neighbours is not None
    generator = torch.Generator().manual_seed(0)
    chance_CC = torch.rand(count, count, generator=generator)
    chance_CC.fill_diagonal_(2)
    chosen_CK = chance_CC.topk(neighbours, dim=1).indices
    adjacency_CC = torch.zeros(count, count, dtype=torch.bool).scatter_(1, chosen_CK, True)
    return adjacency_CC.expand(point.windows, -1, -1)


def time_points(points: Sequence[Point], rounds: int, balances: bool) -> list[dict[str, float]]:
    """Let the points take turns; for a process of its own."""
    torch.set_num_threads(1)
    trainees = [Trainee(point, balances=balances) for point in points]
    passes: list[list[float]] = [[] for _ in points]
    updates: list[list[float]] = [[] for _ in points]
    for turn in range(rounds + 1):
        for number, trainee in enumerate(trainees):
            passed, updated = trainee.step()
            if turn:
                passes[number].append(passed)
                updates[number].append(updated)
    return [
        {
            "pass_ms": 1e3 * statistics.median(passed),
            "optimizer_ms": 1e3 * statistics.median(updated),
            "fullest_expert_over_mean": trainee.imbalance(),
        }
        for trainee, passed, updated in zip(trainees, passes, updates, strict=True)
    ]


def peak_mib(point: Point) -> float:
    """Highest resident memory of two steps over that before; for a process of its own."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    trainee = Trainee(point, balances=False)
    for _ in range(2):
        trainee.step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process that is forked for it and ends with it."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def measure(points: Sequence[Point], *, rounds: int, balances: bool) -> list[dict[str, Any]]:
    """Time and memory of each point of a curve."""
    times = in_own_process(time_points, points, rounds, balances)
    results = []
    for point, found in zip(points, times, strict=True):
        config = point.model
        patches = num_patches(
            config.context_length,
            patch_length=config.patch_length,
            patch_stride=config.patch_stride,
        )
        points_of_a_step = point.windows * point.variates * config.context_length
        step_ms = found["pass_ms"] + found["optimizer_ms"]
        results.append(
            {
                "at": point.name,
                "windows": point.windows,
                "tokens": point.windows * point.variates * patches,
                "cpu_ms": {name[:-3]: round(found[name], 1) for name in ("pass_ms", "optimizer_ms")}
                | {"step": round(step_ms, 1)},
                "pass_cpu_us_a_point": round(1e3 * found["pass_ms"] / points_of_a_step, 3),
                "fullest_expert_over_mean": round(found["fullest_expert_over_mean"], 2),
                "peak_mib": round(in_own_process(peak_mib, replace(point))),
            }
        )
    return results


def growth(curve: list[dict[str, Any]], first: str) -> dict[str, float]:
    """Ratios of a curve's last point to another one."""
    start = next(point for point in curve if point["at"] == first)
    end = curve[-1]
    return {
        f"{part}_{end['at']}_over_{first}": round(end["cpu_ms"][part] / start["cpu_ms"][part], 3)
        for part in ("pass", "optimizer", "step")
    } | {f"peak_memory_{end['at']}_over_{first}": round(end["peak_mib"] / start["peak_mib"], 2)}


def main() -> None:
    """Measure all curves and record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer points, one round")
    parser.add_argument("--only", help="one curve")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, Any] = {"rounds": args.rounds}
    for name, points in curves(quick=args.quick).items():
        if args.only in (None, name):
            rounds = 1 if args.quick else args.rounds
            begun = time.perf_counter()
            curve = measure(points, rounds=rounds, balances="experts" in name)
            first = "8" if any(point.name == "8" for point in points) else points[0].name
            results[name] = {"points": curve, "growth": growth(curve, first)}
            print(name, round(time.perf_counter() - begun), "s", results[name], flush=True)
    if not args.quick and args.only is None:
        record("cost_curves", results, notes="one thread, fp32, points of a curve in turns")


if __name__ == "__main__":
    main()
