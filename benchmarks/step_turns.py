"""Time training steps of several variants in turns, so that a busy machine slows all alike.

What counts are ratios of CPU time within a round; each round begins with another variant.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.ranks import Ranks

# A plain matrix product as training does it, and as torch does by default.
GEMM, GEMM_DEFAULT = "gemm", "gemm, torch's default"
_GEMM_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds of each round by variant; CPU seconds are those of all ranks together."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)

    def speed_over(self, ours: str, twin: str, *, work: float = 1.0) -> float:
        """Return how many times the twin's speed ours is: the median over rounds, by CPU time.

        Args:
            ours: the one variant.
            twin: the other.
            work: how many times the twin's work ours does in a step.
        """
        pairs = zip(self.cpu[twin], self.cpu[ours], strict=True)
        return round(work * statistics.median(theirs / mine for theirs, mine in pairs), 3)

    def median_cpu(self, variant: str) -> float:
        """Return the median CPU seconds of a variant's step."""
        return statistics.median(self.cpu[variant])

    def gemm_share(self, variant: str, flops: float, *, gemm: str = GEMM) -> float:
        """Return the share of the machine's matrix-product rate that a variant reached.

        Args:
            variant: of which.
            flops: operations of its step on all ranks.
            gemm: whose rate: that of training, or torch's default.
        """
        pairs = zip(self.cpu[variant], self.cpu[gemm], strict=True)
        return round(statistics.median(flops / cpu * gemm for cpu, gemm in pairs), 3)

    def figures(self, variant: str, *, tokens: int, points: int = 0) -> dict[str, float]:
        """Sum a variant up: medians and bests, per second and per CPU-second."""
        wall, cpu = self.wall[variant], self.cpu[variant]
        found = {
            "cpu_seconds_median": round(statistics.median(cpu), 4),
            "tokens_per_cpu_second_median": round(tokens / statistics.median(cpu)),
            "tokens_per_cpu_second_best": round(tokens / min(cpu)),
        }
        if points:
            found["points_per_second_median"] = round(points / statistics.median(wall))
            found["points_per_second_best"] = round(points / min(wall))
        return found

    def gemm_gflops(self) -> dict[str, float]:
        """Return the matrix-product rates, medians over rounds, in 1e9 operations a CPU-second."""
        return {n: round(1e-9 / self.median_cpu(n), 1) for n in (GEMM, GEMM_DEFAULT)}


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warm_up: int = 1,
    ranks: Ranks | None = None,
    gemm_precision: str | None = None,
) -> Turns:
    """Do each step once a round and time it. Collective.

    Args:
        steps: by name of the variant.
        rounds: that count.
        warm_up: rounds before those, which do not.
        ranks: that all do the same steps.
        gemm_precision: fp32 or bf16 to time a plain matrix product in each round as well, in CPU
            seconds an operation of one rank.
    """
    ranks = ranks or Ranks()
    turns = Turns()
    names = list(steps) + ([GEMM, GEMM_DEFAULT] if gemm_precision else [])
    for name in names:
        turns.wall[name], turns.cpu[name] = [], []
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            ranks.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            if name in (GEMM, GEMM_DEFAULT):
                with exact_onednn_matmul() if name == GEMM else nullcontext():
                    spent = _gemm_seconds(str(gemm_precision))
            else:
                steps[name]()
                spent = time.process_time() - cpu
            total = ranks.sum(torch.tensor(spent, dtype=torch.float64, device=ranks.device))
            if number >= warm_up:
                turns.wall[name].append(time.perf_counter() - wall)
                # Of the product every rank does its own: the mean is that of one core.
                turns.cpu[name].append(float(total) / (ranks.size if name not in steps else 1))
    return turns


def _gemm_seconds(precision: str, *, products: int = 12) -> float:
    """CPU seconds of an operation of a square matrix product, best of a few products."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.ones(_GEMM_SIZE, _GEMM_SIZE, dtype=dtype) for _ in range(2))
    result = left @ right
    best = float("inf")
    for _ in range(products):
        begun = time.process_time()
        torch.mm(left, right, out=result)
        best = min(best, time.process_time() - begun)
    return best / (2 * _GEMM_SIZE**3)
