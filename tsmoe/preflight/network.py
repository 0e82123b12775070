"""How fast do ranks exchange data: all together, in expert groups, and pair by pair?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tsmoe.checkpoint.elastic import expert_parameters
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict
from tsmoe.ranks import Ranks, start

_MIB = 1 << 20
_SIZES = (_MIB // 16, 4 * _MIB, 64 * _MIB)
_PAIR_BYTES = 8 * _MIB
_ROUNDS = 3
_WIDTH = 256
# A pair below this part of the median pair is named.
_SLOW_SHARE = 0.5
# GPUs of one node or of nodes with a fast network are well above it; TCP is below.
_GPU_WARN_BYTES_PER_SECOND = 3e9


@dataclass(frozen=True, kw_only=True)
class JoinFinding:
    """Whether a rank is in the group of all."""

    backend: str
    seconds: float


def join(scene: Scene) -> JoinFinding:
    """Join the group of all ranks as training does, and add up one number."""
    begun = time.perf_counter()
    scene.doing = "joining the group of all ranks"
    scene.ranks = start(
        timeout_seconds=scene.options.timeout_seconds,
        device=scene.config.training.device,
        store=dist.PrefixStore("group", scene.meeting.store),
    )
    if scene.ranks.size == 1:
        return JoinFinding(backend="", seconds=0.0)
    scene.doing = "a first all-reduce"
    total = scene.ranks.sum(torch.ones(1, device=scene.ranks.device)).item()
    if total != scene.ranks.size:
        raise RuntimeError(f"a sum over {scene.ranks.size} ranks of 1 gave {total:g}")
    return JoinFinding(backend=dist.get_backend(), seconds=time.perf_counter() - begun)


def judge_join(told: Told[JoinFinding]) -> list[Row]:
    """Say how long it took."""
    first = next(iter(told.findings.values()))
    if not first.backend:
        return [told.row(Verdict.OK, "one rank, nothing to join")]
    seconds = max(f.seconds for f in told.findings.values())
    found = f"{len(told.findings)} ranks met by {first.backend} in {seconds:.1f} s"
    return [told.row(Verdict.OK, found)]


@dataclass(frozen=True, kw_only=True)
class NetworkFinding:
    """Bytes a second that a rank sent to others, by size of the tensor."""

    is_gpu: bool
    ranks: int
    """That took part."""
    sizes: list[int] = field(default_factory=list)
    all_reduce: list[float] = field(default_factory=list)
    all_to_all: list[float] = field(default_factory=list)
    partners: list[int] = field(default_factory=list)
    pair_speeds: list[float] = field(default_factory=list)
    """With each partner, in one direction while the other is as busy."""


def look(scene: Scene) -> NetworkFinding:
    """Measure all ranks together, then pairs: of nodes, or of the ranks of a single node."""
    ranks = scene.ranks
    finding = NetworkFinding(is_gpu=ranks.device.type == "cuda", ranks=ranks.size)
    if ranks.size == 1:
        return finding
    for size in _SIZES:
        finding.sizes.append(size)
        finding.all_reduce.append(_all_reduce_speed(scene, ranks, size))
        finding.all_to_all.append(_all_to_all_speed(scene, ranks, size))
    leaders = scene.node_leaders
    members = leaders if len(leaders) > 1 else list(range(ranks.size))
    for pairs in rounds_of_pairs(len(members)):
        for pair in pairs:
            one, other = (members[place] for place in pair)
            if ranks.rank in (one, other):
                partner = other if ranks.rank == one else one
                scene.doing = f"exchanging data with rank {partner}"
                finding.partners.append(partner)
                finding.pair_speeds.append(_pair_speed(ranks, partner))
    scene.doing = "waiting for all pairs of ranks to end"
    ranks.barrier()
    return finding


def look_in_expert_groups(scene: Scene) -> NetworkFinding:
    """Measure the exchange of rows within the groups that share one set of experts."""
    assert scene.engine is not None, "the engine check comes before"
    owners = expert_parameters(scene.engine.model).values()
    ranks = next((owner.ranks for owner in owners), Ranks())
    finding = NetworkFinding(is_gpu=scene.ranks.device.type == "cuda", ranks=ranks.size)
    if ranks.size > 1:
        for size in _SIZES:
            finding.sizes.append(size)
            finding.all_to_all.append(_all_to_all_speed(scene, ranks, size))
    return finding


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """Pair each of `count` with each other once, in rounds in which none is in two pairs."""
    places = list(range(count + count % 2))  # who is paired with the one too many has a rest
    rounds = []
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places), strict=False)
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < count])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds


def _all_reduce_speed(scene: Scene, ranks: Ranks, size: int) -> float:
    scene.doing = f"all-reduce of {size / _MIB:g} MiB over {ranks.size} ranks"
    tensor = torch.ones(size // 4, device=ranks.device)
    seconds = _best_seconds(ranks, lambda: ranks.sum(tensor.fill_(1.0)))
    return 2 * (ranks.size - 1) / ranks.size * size / seconds


def _all_to_all_speed(scene: Scene, ranks: Ranks, size: int) -> float:
    scene.doing = f"all-to-all of {size / _MIB:g} MiB over {ranks.size} ranks"
    share = max(1, size // (4 * _WIDTH * ranks.size))
    rows = torch.ones(share * ranks.size, _WIDTH, device=ranks.device)
    split = [share] * ranks.size
    seconds = _best_seconds(
        ranks, lambda: ranks.start_all_to_all(rows, send=split, receive=split).wait()
    )
    return (ranks.size - 1) * share * _WIDTH * 4 / seconds


def _pair_speed(ranks: Ranks, partner: int) -> float:
    # A small exchange first: the partner may still be busy with another pair.
    small = torch.ones(1, device=ranks.device)
    large = torch.ones(_PAIR_BYTES // 4, device=ranks.device)
    best = float("inf")
    for _ in range(_ROUNDS):
        ranks.swap(small, partner)
        best = min(best, _seconds(ranks, lambda: ranks.swap(large, partner)))
    return _PAIR_BYTES / best


def _best_seconds(ranks: Ranks, exchange: Callable[[], object]) -> float:
    exchange()  # connections are made at first use
    best = float("inf")
    for _ in range(_ROUNDS):
        ranks.barrier()
        best = min(best, _seconds(ranks, exchange))
    return best


def _seconds(ranks: Ranks, exchange: Callable[[], object]) -> float:
    is_gpu = ranks.device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(ranks.device)
    begun = time.perf_counter()
    exchange()
    if is_gpu:
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter() - begun


def judge(told: Told[NetworkFinding]) -> list[Row]:
    """Say what was reached, and name pairs that are far below the others."""
    first = next(iter(told.findings.values()))
    if first.ranks == 1:
        return [told.row(Verdict.OK, "one rank sends nothing")]
    rows = _slow_pairs(told)
    slowest = _speeds(told, "all_reduce")
    found = (
        f"all-reduce {_list(slowest)}, all-to-all {_list(_speeds(told, 'all_to_all'))} GB/s a rank "
        f"with {', '.join(f'{size / _MIB:g}' for size in first.sizes)} MiB"
    )
    if first.is_gpu and max(slowest) < _GPU_WARN_BYTES_PER_SECOND:
        advice = "NCCL may have fallen back to TCP: run with NCCL_DEBUG=INFO and see what it uses"
        return [told.row(Verdict.WARN, found, advice), *rows]
    return [told.row(Verdict.OK, found), *rows]


def judge_expert_groups(told: Told[NetworkFinding]) -> list[Row]:
    """Say what was reached, and name the ranks whose group is far below the others."""
    first = next(iter(told.findings.values()))
    if first.ranks == 1:
        return [told.row(Verdict.OK, "each rank holds all experts, no rows are exchanged")]
    best = {rank: max(f.all_to_all) for rank, f in told.findings.items()}
    median = statistics.median_high(best.values())
    found = (
        f"all-to-all {_list(_speeds(told, 'all_to_all'))} GB/s a rank in groups of {first.ranks}"
    )
    slow = [rank for rank, speed in best.items() if speed < _SLOW_SHARE * median]
    if slow:
        found += f"; {told.where(slow)} reach {_gb(min(best.values()))}, the median {_gb(median)}"
        return [told.row(Verdict.WARN, found, "leave that node out, or see its network")]
    return [told.row(Verdict.OK, found)]


def _slow_pairs(told: Told[NetworkFinding]) -> list[Row]:
    pairs = {
        (rank, partner): speed
        for rank, f in told.findings.items()
        for partner, speed in zip(f.partners, f.pair_speeds, strict=True)
        if rank < partner
    }
    median = statistics.median_high(pairs.values())
    one, other = min(pairs, key=lambda pair: pairs[pair])
    name = f"{told.where([one])} and {told.where([other])}"
    if pairs[one, other] >= _SLOW_SHARE * median:
        found = f"slowest of {len(pairs)} pairs: {_gb(pairs[one, other])} GB/s between {name}"
        return [told.row(Verdict.OK, found)]
    # Whoever is in most of the slow pairs is to blame.
    slow = [rank for pair, speed in pairs.items() if speed < _SLOW_SHARE * median for rank in pair]
    blamed = statistics.mode(slow)
    found = (
        f"{_gb(pairs[one, other])} GB/s between {name}, the median pair has {_gb(median)}; "
        f"{told.where([blamed])} is in {slow.count(blamed)} of {len(slow) // 2} slow pairs"
    )
    return [told.row(Verdict.WARN, found, "leave that node out, or see its network")]


def _speeds(told: Told[NetworkFinding], kind: str) -> list[float]:
    """Of the slowest rank, by size."""
    return [min(s) for s in zip(*(getattr(f, kind) for f in told.findings.values()), strict=True)]


def _list(speeds: list[float]) -> str:
    return ", ".join(map(_gb, speeds))


def _gb(speed: float) -> str:
    return f"{speed / 1e9:.3g}"


JOIN = Check(
    name="joining", finding=JoinFinding, look=join, judge=judge_join,
    needs=("world", "settings", "device"),
)  # fmt: skip
NETWORK = Check(name="network", finding=NetworkFinding, look=look, judge=judge, needs=("joining",))
EXPERT_GROUPS = Check(
    name="expert groups", finding=NetworkFinding, look=look_in_expert_groups,
    judge=judge_expert_groups, needs=("engine",),
)  # fmt: skip
