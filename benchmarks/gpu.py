"""What the presets reach on one GPU: points/s, MFU, where kernel time goes, grouped against loop.

Trains `time_tracker_base` and `time_tracker_large` in bf16 under DeepSpeed (ZeRO 1) on windows made
up, with micro-batches that double until memory is full. MFU counts the model's operations (routed
experts exactly, nothing that is computed twice) against the data sheet's dense bf16 rate.

    python benchmarks/gpu.py             # on one GPU; some 4 minutes
    python benchmarks/gpu.py --smoke     # tiny sizes on the processor: to see that it runs
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from record import record
from step_speed import random_walks
from tsmoe import ranks as ranks_module
from tsmoe.batch import WindowBatch
from tsmoe.cost.flops import training_flops
from tsmoe.cost.hardware import measure_gemm_rate, peak_flops
from tsmoe.engine.build import build_engine
from tsmoe.ranks import Ranks
from tsmoe.train.objective import NextPatchObjective
from tsmoe.train.run_config import RunConfig, resolve
from tsmoe.train.stages import prepare_pretraining
from tsmoe.train.step import training_step

PRESETS = ("time_tracker_base", "time_tracker_large")
MICRO_BATCHES = (64, 128, 256, 512, 1024, 2048)
# What differs from the preset, by name of the variant.
VARIANTS: dict[str, list[str]] = {
    "as the preset": [],
    "loop over experts": ["model.feed_forward.compute=loop"],
    "blocks compiled": ["training.compiles_blocks=true"],
    "activations recomputed": ["training.recomputes_activations=true"],
}
SMOKE_SIZES = [
    "model.d_model=64", "model.num_heads=2", "model.num_layers=2", "model.context_length=192",
    "model.lookahead_patches=1", "model.feed_forward.d_ff_expert=64",
    "model.feed_forward.d_ff_shared=128",
]  # fmt: skip
# Kernels by what they are for, the first pattern that fits.
KINDS = (
    ("attention", r"flash|fmha|attention|softmax"),
    ("matrix products", r"gemm|cutlass|nvjet|xmma|cublas|grouped_mm|aten::(mm|addmm|bmm|baddbmm)"),
    ("optimizer and clipping", r"adam|multi_tensor|foreach|lp_norm|l2norm"),
    ("communication", r"nccl|all_?reduce|all_?to_?all"),
    ("copies", r"memcpy|memset|copy|cat|fill"),
    ("dispatch", r"index|gather|scatter|sort|scan|topk|histogram|bincount|nonzero"),
    ("compiled", r"triton"),
    ("norms and sums", r"reduce|norm"),
    ("elementwise", r"elementwise|silu|mul|add|aten::"),
)


def run_config(preset: str, settings: list[str], *, is_smoke: bool) -> RunConfig:
    """Return a preset on one rank."""
    sizes = ["training.global_batch_size=64", "training.micro_batch_size=64"]
    return resolve(preset, [*sizes, *(SMOKE_SIZES if is_smoke else []), *settings])


def batch_on(config: RunConfig, windows: int, device: torch.device) -> WindowBatch:
    """Make a batch of windows on the device."""
    batch = random_walks(config.model, windows, seed=0)
    return WindowBatch(
        values_BCL=batch.values_BCL.to(device), observed_BCL=batch.observed_BCL.to(device),
        is_target_BCL=batch.is_target_BCL.to(device), series_ids_B=batch.series_ids_B.to(device),
    )  # fmt: skip


def seconds_of(step: Callable[[], object], *, warm_up: int, rounds: int) -> float:
    """Return the median seconds of a step, the device's work included."""
    found = []
    for number in range(warm_up + rounds):
        _wait()
        begun = time.perf_counter()
        step()
        _wait()
        if number >= warm_up:
            found.append(time.perf_counter() - begun)
    return statistics.median(found)


def sweep(
    preset: str,
    settings: list[str],
    ranks: Ranks,
    *,
    peak: float,
    micro_batches: tuple[int, ...],
    is_smoke: bool,
) -> dict[str, Any]:
    """Time steps with growing micro-batches; break the best one's kernel time down."""
    config = run_config(preset, settings, is_smoke=is_smoke)
    engine = build_engine(config, ranks, prepare=prepare_pretraining)
    found: dict[str, Any] = {"micro_batches": {}}
    best, best_step = 0.0, None
    for windows in micro_batches:
        step = partial(
            training_step,
            engine,
            [batch_on(config, windows, ranks.device)],
            step=1,
            lr=1e-4,
            balance_rate=config.balance.rate,
            objective=NextPatchObjective(
                error_unit=config.training.error_unit, target_clip=config.training.target_clip
            ),
            series_name=str,
        )
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = seconds_of(step, warm_up=1 if is_smoke else 3, rounds=1 if is_smoke else 8)
        except torch.cuda.OutOfMemoryError:
            found["micro_batches"][windows] = "out of memory"
            break
        flops = training_flops(config.model, windows=windows).total
        found["micro_batches"][windows] = {
            "step_seconds": round(seconds, 5),
            "points_per_second": round(windows * config.model.context_length / seconds),
            "tflops_per_second": round(flops / seconds / 1e12, 3),
            "mfu": round(flops / seconds / peak, 3),
            "peak_memory_gib": _peak_memory(),
        }
        if flops / seconds > best:
            best, best_step = flops / seconds, step
    if best_step is not None:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            found["kernel_time"] = breakdown(best_step)
    del engine, best_step
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def breakdown(step: Callable[[], object], *, steps: int = 3, longest: int = 12) -> dict[str, Any]:
    """Say where the device's time goes, by kind of kernel and for the longest kernels."""
    step()
    has_gpu = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if has_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        _wait()
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        _wait()
        wall = time.perf_counter() - begun
    times = {
        event.key: (event.self_device_time_total if has_gpu else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    total = sum(times.values())
    shares: dict[str, float] = dict.fromkeys([kind for kind, _ in KINDS] + ["other"], 0.0)
    for name, seconds in times.items():
        shares[_kind(name)] += seconds / total
    ranking = sorted(times.items(), key=lambda item: -item[1])[:longest]
    return {
        "device_busy_share": round(total / wall, 3),
        "shares": {kind: round(share, 3) for kind, share in shares.items()},
        "longest": {name[:80]: round(seconds / total, 3) for name, seconds in ranking},
    }


def _kind(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel.lower())), "other")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_memory() -> float | None:
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def main() -> None:
    """Go through presets and variants; a variant that fails is recorded with its reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any machine")
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        raise SystemExit("benchmarks/gpu.py needs a CUDA GPU and finds none; --smoke runs anywhere")
    ranks = ranks_module.start()
    if args.smoke:
        device, peak = "smoke", measure_gemm_rate("bf16", torch.get_num_threads())
        micro_batches: tuple[int, ...] = (4, 8)
    else:
        device = torch.cuda.get_device_name()
        known = peak_flops(device, "bf16")
        if known is None:
            raise SystemExit(f"no bf16 rate is known for {device}; add it to tsmoe.cost.hardware")
        peak, micro_batches = known, MICRO_BATCHES
    results: dict[str, Any] = {"device": device, "peak_tflops": round(peak / 1e12, 2)}
    run = partial(sweep, ranks=ranks, peak=peak, is_smoke=args.smoke)
    for preset in args.presets:
        results[preset] = {}
        for name, settings in VARIANTS.items():
            # Variants are compared at large micro-batches; the preset itself at all.
            sizes = micro_batches if not settings else micro_batches[-3:-1] or micro_batches[:1]
            try:
                found = run(preset, settings, micro_batches=sizes)
            except Exception as error:  # a GPU is at hand for minutes: keep what the others find
                found = {"failed": f"{type(error).__name__}: {error}"[:500]}
            results[preset][name] = found
            print(preset, name, json.dumps(found.get("micro_batches", found)), flush=True)
    ranks_module.stop()
    if args.smoke:
        print(json.dumps(results, indent=1))
        return
    record("gpu", results, notes="one GPU, one rank; medians of 8 steps, device synchronised")


if __name__ == "__main__":
    main()
