"""The large preset on 8 to 4,096 ranks: set up, checked, one step traced, and its time predicted.

Nothing communicates: each rank runs alone under torch's fake process group (`fake_ranks.py`). Ranks
of a narrow copy (same layers, experts and patches) are compared with one another; one rank of each
number of ranks has the full size. From the collectives of the full-size trace follows a prediction
for GPUs; what it assumes is in the results. How well such a prediction meets a measured step on two
ranks of this machine, see `weak_scaling.py`.

    python benchmarks/scaling.py            # 8 .. 4,096 ranks
    python benchmarks/scaling.py --quick    # 8 and 512, narrow only
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from collective_cost import ALL_GATHER, ALL_REDUCE, EXCHANGE, KINDS, Link, Network, predict
from data_pipeline.shards import Corpus
from fake_ranks import FakeRank, fake_run
from rank_mistakes import rank_mistakes
from record import record
from runs import corpus as build_corpus
from tsmoe.cost.flops import training_flops
from tsmoe.cost.hardware import GPUS
from tsmoe.data import plan
from tsmoe.data.loader import DataConfig, TrainingBatches
from tsmoe.data.windows import training_windows
from tsmoe.errors import ConfigError
from tsmoe.moe.layer import MoEConfig
from tsmoe.ranks import Ranks
from tsmoe.train.run_config import RunConfig, resolve

WORLDS = (8, 64, 512, 4096)
NARROW = [
    "model.d_model=64",
    "model.feed_forward.d_ff_expert=64",
    "model.feed_forward.d_ff_shared=128",
]
# The GPU and network that the prediction is for. Shares of a data sheet's rate that are reached are
# assumptions, and so are latencies: of NCCL, one step inside a node and between nodes.
GPU = GPUS["h100"]
MODEL_FLOPS_UTILISATION = 0.40
LINK_SHARE = 0.8
NETWORK_BYTES_PER_SECOND = 50e9  # 400 Gbit/s for each GPU
LATENCY_SECONDS = {
    "inside": {ALL_REDUCE: 3e-6, ALL_GATHER: 2e-6, EXCHANGE: 12e-6},
    "between": {ALL_REDUCE: 8e-6, ALL_GATHER: 3e-6, EXCHANGE: 25e-6},
}


def _links(place: str, bytes_per_second: float) -> dict[str, Link]:
    return {
        kind: Link(latency_seconds=seconds, bytes_per_second=LINK_SHARE * bytes_per_second)
        for kind, seconds in LATENCY_SECONDS[place].items()
    }


ASSUMED = Network(
    ranks_per_node=8,
    inside=_links("inside", GPU.link_bandwidth),
    between=_links("between", NETWORK_BYTES_PER_SECOND),
)
# Standard deviation of a rank's compute time: the slowest of many makes the others wait.
JITTER = 0.01
# Of fp32 master, gradient and two moments, each read and written or so, for an owned element.
OPTIMIZER_BYTES = 28


def large_config(
    world_size: int, size: int, settings: Sequence[str], *, windows: int = 1
) -> RunConfig:
    """The large preset on some ranks; a step's windows grow with the ranks (weak scaling)."""
    return resolve(
        "time_tracker_large",
        [
            "training.device=cpu",
            f"training.micro_batch_size={windows}",
            f"training.global_batch_size={windows * world_size}",
            f"engine.expert_parallel_size={size}",
            *settings,
        ],
    )


def preset_as_it_is(world_size: int) -> str:
    """Say whether the preset's own batch sizes fit so many ranks."""
    try:
        resolve("time_tracker_large", []).check_world_size(world_size)
    except ConfigError as error:
        return f"refused: {error}"
    return "accepted"


def fit_together(world_size: int, size: int) -> dict[str, Any]:
    """Compare ranks of the narrow copy: all that share the first set of experts, and others."""
    chosen = sorted({*range(size), 1, world_size // 2, world_size - 1})
    begun = time.perf_counter()
    ranks = fake_run(large_config(world_size, size, NARROW, windows=2), chosen, world_size)
    found = rank_mistakes(ranks, expert_parallel_size=size)
    if found:
        raise RuntimeError(f"{world_size} ranks, {size} share experts: " + "; ".join(found))
    last = ranks[-1]
    return {
        "ranks_run": chosen,
        "mistakes": found,
        "groups_made": len(last.groups),
        "group_seconds": round(last.group_seconds, 4),
        "setup_seconds": round(last.build_seconds, 2),
        "step_seconds": round(last.step_seconds, 2),
        "collectives_in_a_step": len(last.collectives),
        "optimizer_elements_of_a_rank": sum(part.size for part in last.partitions),
        "files_of_a_checkpoint": sorted(file for rank in ranks for file in rank.writes),
        "keys_of_a_checkpoint": sum(len(keys) for rank in ranks for keys in rank.writes.values()),
        "benchmark_seconds": round(time.perf_counter() - begun, 1),
    }


def full_size(world_size: int, size: int) -> tuple[FakeRank, dict[str, Any]]:
    """Run the last rank of the preset in its full size, with one window."""
    (rank,) = fake_run(large_config(world_size, size, []), [world_size - 1], world_size)
    found = rank_mistakes([rank], expert_parallel_size=size)
    if found:
        raise RuntimeError("; ".join(found))
    return rank, {
        "rank": rank.rank,
        "expert_ids": rank.expert_ids[0],
        "parameters": sum(part.num_elements for part in rank.partitions),
        "optimizer_elements_of_a_rank": sum(part.size for part in rank.partitions),
        "setup_seconds": round(rank.build_seconds, 1),
        "step_seconds": round(rank.step_seconds, 1),
        "peak_mib": round(rank.peak_mib),
        "loss": round(rank.loss, 4),
        "bytes_of_a_step": {
            name: sum(c.num_bytes for c in rank.collectives if c.kind == kind and not c.send)
            for kind, name in KINDS.items()
        },
    }


def windows_of_ranks(world_size: int, corpus: Corpus, *, stride: int = 1) -> dict[str, Any]:
    """Check that ranks see the windows of one rank, each once, for a step of 4 windows a rank."""
    config = resolve("time_tracker_tiny", [])
    index = training_windows(
        corpus,
        window_length=config.model.window_length,
        patch_length=config.model.patch_length,
        stride=1,
    )

    def of(ranks: Ranks) -> TrainingBatches:
        return TrainingBatches(
            corpus,
            index,
            DataConfig(),
            seed=0,
            global_batch_size=4 * world_size,
            micro_batch_size=2,
            ranks=ranks,
        )

    def drawn(batches: TrainingBatches, item: int) -> Any:
        windows = batches[item]
        return windows.series_ids_B.numpy(), windows.values_BCL.numpy()

    alone = of(Ranks())
    begun = time.perf_counter()
    seen = range(0, world_size, stride)
    for rank in seen:
        batches = of(Ranks(rank=rank, size=world_size))
        for micro_batch in range(2):
            series, values = drawn(batches, micro_batch)
            expected, expected_values = drawn(alone, micro_batch * world_size + rank)
            if not (np.array_equal(series, expected)
                    and np.array_equal(values, expected_values, equal_nan=True)):  # fmt: skip
                raise RuntimeError(f"rank {rank} of {world_size} sees other windows")
    return {"ranks_checked": len(seen), "seconds": round(time.perf_counter() - begun, 1)}


def in_a_larger_world(rank: FakeRank, world_size: int) -> FakeRank:
    """Say what a rank that shares no experts would do among more: the same, with all of them."""
    everyone = tuple(range(world_size))
    return replace(
        rank,
        rank=world_size - 1,
        world_size=world_size,
        collectives=tuple(replace(call, members=everyone) for call in rank.collectives),
        partitions=tuple(
            replace(part, size=-(-part.num_elements // world_size), members=everyone)
            for part in rank.partitions
        ),
    )


def predicted(rank: FakeRank, *, windows: int) -> dict[str, float]:
    """Predict a step of so many windows a rank on the assumed GPUs, in milliseconds."""
    config = resolve("time_tracker_large", [])
    feed_forward = config.model.feed_forward
    assert isinstance(feed_forward, MoEConfig)
    flops = training_flops(config.model, windows=windows).total
    compute = flops / (MODEL_FLOPS_UTILISATION * GPU.bf16_flops)
    owned = sum(part.size for part in rank.partitions)
    optimizer = OPTIMIZER_BYTES * owned / GPU.memory_bandwidth
    patches = config.model.context_length // config.model.patch_stride
    rows = windows * patches * feed_forward.router.top_k
    parts = predict(rank.collectives, ASSUMED, rows=rows)
    jitter = compute * JITTER * math.sqrt(2 * math.log(rank.world_size))
    after_backward = parts["all_reduce"] + parts["all_gather"]
    useful = compute + optimizer
    step = useful + jitter + sum(parts.values())
    # The gradients of a block can be reduced while those of earlier blocks are computed.
    hidden = min(parts["all_reduce"], compute * 2 / 3)
    return {
        "compute_ms": round(1e3 * compute, 2),
        "optimizer_ms": round(1e3 * optimizer, 2),
        "jitter_ms": round(1e3 * jitter, 2),
        "all_to_all_ms": round(1e3 * parts["all_to_all"], 2),
        "all_reduce_ms": round(1e3 * parts["all_reduce"], 2),
        "all_gather_ms": round(1e3 * parts["all_gather"], 2),
        "share_of_data_parallel_exchange": round(after_backward / step, 3),
        "efficiency": round(useful / step, 3),
        "efficiency_with_overlapped_reduction": round(useful / (step - hidden), 3),
    }


def assumptions() -> dict[str, Any]:
    """What the prediction takes for granted."""
    return {
        "gpu": "H100 SXM, 8 in a node",
        "peak_bf16_flops": GPU.bf16_flops,
        "model_flops_utilisation_of_compute": MODEL_FLOPS_UTILISATION,
        "link_bytes_per_second_inside_a_node": GPU.link_bandwidth,
        "link_bytes_per_second_between_nodes_of_each_gpu": NETWORK_BYTES_PER_SECOND,
        "share_of_link_reached": LINK_SHARE,
        "latency_of_a_step_seconds": {
            place: {KINDS[kind]: seconds for kind, seconds in by_kind.items()}
            for place, by_kind in LATENCY_SECONDS.items()
        },
        "algorithms": "all-reduce: tree in latency, ring in bytes; all-gather: ring; all-to-all: "
        "each to each at once; the network cards of a node share a ring's bytes",
        "jitter_of_compute": JITTER,
        "optimizer_bytes_an_element": OPTIMIZER_BYTES,
        "experts": "used alike by all ranks",
        "efficiency": "what a step takes without exchange and jitter, over what it takes; first "
        "without any overlap, then with the all-reduce behind 2/3 of compute",
    }


def main() -> None:
    """Check and predict for each number of ranks, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 and 512 ranks, narrow only")
    args = parser.parse_args()
    worlds = (8, 512) if args.quick else WORLDS
    results: dict[str, Any] = {"preset": "time_tracker_large", "worlds": {}}
    traces: dict[int, FakeRank] = {}
    for world_size in worlds:
        found: dict[str, Any] = {"preset_as_it_is": preset_as_it_is(world_size)}
        for size in (1, 8):
            found[f"expert_parallel_{size}"] = fit_together(world_size, size)
        if not args.quick:
            traces[world_size], found["full_size"] = full_size(world_size, 8)
        results["worlds"][str(world_size)] = found
        print(world_size, found, flush=True)
    plan._WINDOWS_AT_A_TIME = 64  # of few windows a rank; else 65,536 are drawn for each
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus.open(build_corpus(Path(folder)))
        for world_size in worlds:
            results["worlds"][str(world_size)]["windows"] = windows_of_ranks(
                world_size, corpus, stride=1 if world_size < 4096 else 8
            )
    if traces:
        results["assumptions"] = assumptions()
        whole, results["full_size_expert_parallel_1"] = full_size(8, 1)
        results["predicted"] = {
            f"{windows}_windows_a_rank": {
                str(world): {
                    "expert_parallel_8": predicted(rank, windows=windows),
                    "expert_parallel_1": predicted(
                        in_a_larger_world(whole, world), windows=windows
                    ),
                }
                for world, rank in traces.items()
            }
            for windows in (64, 256, 1024)
        }
    if args.quick:
        print(json.dumps(results, indent=1))
        return
    notes = "simulated: one process at a time, no communication; predictions are no measurements"
    record("scaling", results, notes=notes)


if __name__ == "__main__":
    main()
