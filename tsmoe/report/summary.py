"""The numbers of a run's report, as plain JSON.

Shapes: S steps, M expert layers, E routed experts, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from tsmoe.report.history import BY_RANK, EXCHANGE_BY_LAYER, RunHistory, gaps
from tsmoe.report.survival import summarise_end

# What a run is like now is the mean over so many of its newest tables.
_NEWEST = 20


def summarise(history: RunHistory) -> dict[str, Any]:
    """Put a run's results together; what is not known is null."""
    losses = history.scalars["loss/train"]
    recent = max(1, len(losses) // 20)
    training = history.config.get("training") or {}
    best = min(history.validation, key=lambda pair: pair[1], default=None)
    return {
        "run": str(history.path),
        "state": history.state,
        "steps": {"done": int(history.steps[-1]) + 1, "planned": training.get("steps")},
        "starts": [{"step": step, **start} for step, start in history.starts],
        "loss": {
            "first": _known(losses[0]),
            "mean_of_last": {"steps": recent, "loss": _known(losses[-recent:].mean())},
            "best_validation": best and {"step": best[0] + 1, "loss": _known(best[1])},
            "last_validation": _known(history.validation[-1][1]) if history.validation else None,
        },
        "speed": speed_summary(history),
        "experts": expert_summary(history),
        "stragglers": straggler_summary(history),
        "sources": history.sources[-1][1] if history.sources else None,
        "stream": history.streams[-1][1] if history.streams else None,
        "verdict": history.verdict,
        "not_finite": history.not_finite,
        "lost_shards": history.lost_shards,
        "ends": [summarise_end(end) for end in history.ends],
        "checkpoints": [asdict(checkpoint) for checkpoint in history.checkpoints],
        "missing": gaps(history),
    }


def speed_summary(history: RunHistory) -> dict[str, float | None]:
    """Return medians over the steps, but for the first after each start, which are no measure."""
    firsts = {step for step, _ in history.starts} | {int(history.steps[0])}
    is_steady = ~np.isin(history.steps, sorted(firsts))
    if not is_steady.any():
        is_steady[:] = True
    values = {name: array[is_steady] for name, array in history.scalars.items()}
    summary = {
        f"median_{name.removeprefix('speed/')}": _known(_nan_median(values[name]))
        for name in (
            "speed/step_seconds",
            "speed/points_per_second",
            "speed/tokens_per_second",
            "speed/flops_per_second",
            "speed/mfu",
            "speed/data_wait_share",
            "communication_share",
            "all_to_all_share",
            "bytes_out",
        )
    }
    peak = history.scalars["peak_memory_bytes"]
    summary["peak_memory_bytes"] = None if np.isnan(peak).all() else float(np.nanmax(peak))
    return summary


def expert_summary(history: RunHistory) -> dict[str, Any] | None:
    """Describe the experts of each layer in the newest steps; None for a dense model."""
    if not history.num_layers:
        return None
    load_SME = history.tables["load"].tables[-_NEWEST:]
    share_ME = load_SME.sum(0) / np.maximum(load_SME.sum((0, 2)), 1)[:, None]
    dead = history.dead or {}
    layers: list[dict[str, Any]] = []
    for layer in range(history.num_layers):
        values: dict[str, Any] = {
            "layer": layer,
            "busiest_times_mean": float(share_ME[layer].max() * share_ME.shape[1]),
            "idlest_times_mean": float(share_ME[layer].min() * share_ME.shape[1]),
            "dead_experts": None if dead.get("ids") is None else dead["ids"][layer],
        }
        for name in ("load_entropy", "live_experts", "margin", *EXCHANGE_BY_LAYER):
            values[name] = _newest_mean(history, name, layer)
        layers.append(values)
    return {
        "newest_steps_recorded": len(load_SME),
        "dead_after_steps": dead.get("after_steps"),
        "layers": layers,
    }


def straggler_summary(history: RunHistory) -> dict[str, Any] | None:
    """Compare the ranks; None if nothing was recorded of them."""
    if not history.tables.get("compute_seconds"):
        return None
    spread = history.scalars["straggler_spread_seconds"]
    spread = spread[~np.isnan(spread)]
    slowest = history.scalars["slowest_rank"]
    slowest = slowest[~np.isnan(slowest)]
    num_ranks = history.tables["compute_seconds"].tables.shape[1]
    ranks = []
    for rank in range(num_ranks):
        of_rank = {
            f"mean_{name}" if name != "memory_bytes" else "peak_memory_bytes": float(
                (np.max if name == "memory_bytes" else np.mean)(
                    history.tables[name].tables[:, rank]
                )
            )
            for name in BY_RANK
        }
        share = float((slowest == rank).mean()) if slowest.size else None
        ranks.append({"rank": rank, **of_rank, "slowest_share_of_steps": share})
    return {
        "median_spread_seconds": _known(np.median(spread)) if spread.size else None,
        "spread_seconds_of_95_percent": _known(np.quantile(spread, 0.95)) if spread.size else None,
        "ranks": ranks,
    }


def _newest_mean(history: RunHistory, name: str, layer: int) -> float | None:
    if not history.tables.get(name):
        return None
    newest = history.tables[name].tables[-_NEWEST:, layer]
    return None if np.isnan(newest).all() else float(np.nanmean(newest))


def _nan_median(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(np.median(values)) if values.size else math.nan


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
