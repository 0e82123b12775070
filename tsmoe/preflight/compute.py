"""Is a rank slower than the others at multiplying matrices?"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from tsmoe.cost.hardware import measure_gemm_rate
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict
from tsmoe.ranks import choose_device

_WARN_SHARE, _FAIL_SHARE = 0.75, 0.5
_GPU_ROUNDS, _GPU_PRODUCTS, _GPU_SIZE = 5, 10, 8192


@dataclass(frozen=True, kw_only=True)
class ComputeFinding:
    """What a rank reaches."""

    flops: float
    """Operations a second of a matrix product."""
    is_gpu: bool


def look(scene: Scene) -> ComputeFinding:
    """Time matrix products of the run's precision."""
    training = scene.config.training
    device = choose_device(training.device, scene.local_rank)
    if device.type == "cuda":
        return ComputeFinding(flops=_gpu_rate(device, training.precision), is_gpu=True)
    with exact_onednn_matmul(device):
        rate = measure_gemm_rate(training.precision, torch.get_num_threads())
    return ComputeFinding(flops=rate, is_gpu=False)


def _gpu_rate(device: torch.device, precision: str) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(_GPU_SIZE, _GPU_SIZE, device=device, dtype=dtype) for _ in "ab")
    result = left @ right
    best = 0.0
    for _ in range(_GPU_ROUNDS):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(_GPU_PRODUCTS):
            torch.mm(left, right, out=result)
        torch.cuda.synchronize(device)
        best = max(best, _GPU_PRODUCTS * 2 * _GPU_SIZE**3 / (time.perf_counter() - begun))
    return best


def judge(told: Told[ComputeFinding]) -> list[Row]:
    """Compare each rank with the median; cores may be shared with others, so there only warn."""
    rates = {rank: f.flops for rank, f in told.findings.items()}
    median = statistics.median_high(rates.values())
    slowest = min(rates, key=lambda rank: rates[rank])
    found = f"{median / 1e12:.3g} TFLOP/s a rank"
    if len(rates) > 1:
        found += f", slowest {rates[slowest] / 1e12:.3g} ({told.where([slowest])})"
    rows = []
    for rank, rate in rates.items():
        if rate < _WARN_SHARE * median:
            is_bad = told.findings[rank].is_gpu and rate < _FAIL_SHARE * median
            rows.append(
                told.row(
                    Verdict.FAIL if is_bad else Verdict.WARN,
                    f"{told.where([rank])} reaches {rate / 1e12:.3g} TFLOP/s, the median is "
                    f"{median / 1e12:.3g}",
                    "all ranks wait for it: see clocks, heat and other processes; leave it out",
                )
            )
    return rows or [told.row(Verdict.OK, found)]


CHECK = Check(name="compute", finding=ComputeFinding, look=look, judge=judge, needs=("device",))
