"""Two ranks against one, each on a core of its own: what data and expert parallel training cost.

Every rank has the same number of windows, so with perfect scaling a step of two ranks takes as long
as one of one rank. Two processes on two cores share caches, memory and the clock's headroom even if
they never talk: two independent runs at the same time are a second yardstick. All take turns.
From a step's collectives, traced without communication, and the speed of gloo follows a prediction
of the two ranks' step, which is compared with what was measured.

    python benchmarks/weak_scaling.py            # widths 64 (the tiny preset), 256 and 512
    python benchmarks/weak_scaling.py --quick    # the tiny preset only, few rounds
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from typing import Any

from collective_cost import KINDS, Link, Network, predict
from fake_ranks import FakeRank, fake_run
from rank_turns import Worker, start_workers, together
from record import record
from tsmoe.moe.layer import MoEConfig
from tsmoe.train.run_config import RunConfig, resolve

# Width, windows of 14 tokens a rank and step, steps of a turn.
SIZES = {
    "tiny_64_windows": (64, 64, 6),
    "tiny_256_windows": (64, 256, 2),
    "d256_64_windows": (256, 64, 1),
    "d256_256_windows": (256, 256, 1),
    "d512_128_windows": (512, 128, 1),
}
TURNS = ("alone", "independent", "data_parallel", "expert_parallel")
SMALL_BYTES, LARGE_BYTES = 4096, 4 * 2**20


def run_config(width: int, windows: int, *, world_size: int, size: int) -> RunConfig:
    """The tiny preset of some width on some ranks."""
    return resolve(
        "time_tracker_tiny",
        [
            f"model.d_model={width}",
            f"model.feed_forward.d_ff_expert={width}",
            f"model.feed_forward.d_ff_shared={2 * width}",
            "training.device=cpu",
            f"training.micro_batch_size={windows}",
            f"training.global_batch_size={windows * world_size}",
            f"engine.expert_parallel_size={size}",
        ],
    )


def gloo() -> Network:
    """Time small and large collectives of two ranks that do nothing else."""
    workers = start_workers(2, {})
    links = {}
    for kind, name in KINDS.items():
        small = max(together(workers, "collective", name, SMALL_BYTES, 30))
        large = max(together(workers, "collective", name, LARGE_BYTES, 10))
        sent = LARGE_BYTES * (1.0 if name == "all_reduce" else 0.5)
        links[kind] = Link(
            # A reduction of two ranks is two steps of the model, the others one.
            latency_seconds=small / (2 if name == "all_reduce" else 1),
            bytes_per_second=sent / max(large - small, 1e-9),
        )
    for worker in workers:
        worker.close()
    return Network(ranks_per_node=2, inside=links, between=links)


def take_turns(
    alone: Sequence[Worker], ranks: Sequence[Worker], name: str, *, steps: int, rounds: int
) -> dict[str, list[list[dict[str, Any]]]]:
    """Return, for each kind of turn, what each process found in each round."""
    turns = {
        "alone": (alone[:1], name),
        "independent": (alone, name),
        "data_parallel": (ranks, f"{name}_1"),
        "expert_parallel": (ranks, f"{name}_2"),
    }
    for workers, engine in turns.values():
        together(workers, "step", engine, 2)
    found: dict[str, list[list[dict[str, Any]]]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for turn, (workers, engine) in turns.items():
            found[turn].append(together(workers, "step", engine, steps))
    return found


def figures(found: dict[str, list[list[dict[str, Any]]]]) -> dict[str, Any]:
    """Sum up the turns: medians over rounds, ratios round by round."""

    def each(turn: str, what: str) -> list[float]:
        # The slower process ends a step of two; of two independent ones, both count.
        combine = statistics.mean if turn == "independent" else max
        return [combine([one[what] for one in of_round]) for of_round in found[turn]]

    def ratio(one: str, other: str, what: str) -> float:
        pairs = zip(each(one, what), each(other, what), strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    def median(turn: str, what: str) -> float:
        return statistics.median(each(turn, what))

    results: dict[str, Any] = {
        turn: {
            "step_ms_median": round(1e3 * median(turn, "wall"), 2),
            "step_ms_best": round(1e3 * min(each(turn, "wall")), 2),
            "cpu_ms_median": round(1e3 * median(turn, "cpu"), 2),
            "update_ms_median": round(1e3 * median(turn, "update"), 2),
        }
        for turn in TURNS
    }
    for turn in ("data_parallel", "expert_parallel"):
        names = sorted({name for of in found[turn] for one in of for name in one["waits"]})
        waits = {
            name: statistics.median(
                statistics.mean(one["waits"].get(name, 0.0) for one in of) for of in found[turn]
            )
            for name in names
        }
        results[turn] |= {
            "efficiency_of_alone": ratio("alone", turn, "wall"),
            "efficiency_of_independent": ratio("independent", turn, "wall"),
            "efficiency_of_independent_by_cpu": ratio("independent", turn, "cpu"),
            "waited_ms": {name: round(1e3 * seconds, 2) for name, seconds in waits.items()},
            "share_waited": round(sum(waits.values()) / median(turn, "wall"), 3),
            "rows_of_fuller_rank_over_mean": round(median(turn, "fuller_rank"), 3),
        }
    results["independent"]["efficiency_of_alone"] = ratio("alone", "independent", "wall")
    return results


def prediction(
    rank: FakeRank, config: RunConfig, network: Network, measured: dict[str, Any], turn: str
) -> dict[str, Any]:
    """Predict the step from its parts, and say how far off that is."""
    feed_forward = config.model.feed_forward
    assert isinstance(feed_forward, MoEConfig)
    patches = config.model.context_length // config.model.patch_stride
    rows = config.training.micro_batch_size * patches * feed_forward.router.top_k
    parts = predict(rank.collectives, network, rows=rows)
    base = measured["independent"]
    update = base["update_ms_median"] / 2  # the optimizer's states are halved over two ranks
    compute = base["step_ms_median"] - base["update_ms_median"]
    step = compute + update + 1e3 * sum(parts.values())
    return {
        "collectives_ms": {name: round(1e3 * seconds, 2) for name, seconds in parts.items()},
        "step_ms": round(step, 2),
        "over_measured": round(step / measured[turn]["step_ms_median"], 3),
    }


def traces(name: str) -> dict[str, tuple[FakeRank, RunConfig]]:
    """Trace the first of two ranks, without and with experts spread."""
    width, windows, _ = SIZES[name]
    found = {}
    for turn, size in (("data_parallel", 1), ("expert_parallel", 2)):
        config = run_config(width, windows, world_size=2, size=size)
        found[turn] = (fake_run(config, [0], 2)[0], config)
    return found


def main() -> None:
    """Measure each size and record it with its prediction."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the tiny preset, 3 rounds")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    network = gloo()
    names = [next(iter(SIZES))] if args.quick else list(SIZES)
    rounds = 3 if args.quick else args.rounds
    results: dict[str, Any] = {
        "rounds": rounds,
        "gloo": {
            KINDS[kind]: {
                "latency_us": round(1e6 * link.latency_seconds, 1),
                "bytes_per_second": round(link.bytes_per_second),
            }
            for kind, link in network.inside.items()
        },
        "sizes": {},
    }
    for name in names:
        width, windows, steps = SIZES[name]
        traced = traces(name)
        of_one = {name: run_config(width, windows, world_size=1, size=1)}
        of_two = {f"{name}_{s}": run_config(width, windows, world_size=2, size=s) for s in (1, 2)}
        alone = [start_workers(1, of_one)[0] for _ in range(2)]
        ranks = start_workers(2, of_two)
        measured = figures(take_turns(alone, ranks, name, steps=steps, rounds=rounds))
        for worker in (*alone, *ranks):
            worker.close()
        measured["predicted"] = {
            turn: prediction(rank, config, network, measured, turn)
            for turn, (rank, config) in traced.items()
        }
        results["sizes"][name] = {"d_model": width, "windows_a_rank": windows} | measured
        print(name, measured, flush=True)
    if not args.quick:
        record("weak_scaling", results, notes="one thread a rank, gloo, fp32, ZeRO 1; turns")


if __name__ == "__main__":
    main()
