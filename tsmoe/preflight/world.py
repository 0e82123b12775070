"""Are these the ranks that were asked for, and do they train together?"""

from __future__ import annotations

import os
from dataclasses import dataclass

from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict, count_of


@dataclass(frozen=True, kw_only=True)
class WorldFinding:
    """What the launcher told a rank."""

    world_size: int
    local_rank: int
    local_world_size: int | None
    """Ranks of this node; None where the launcher does not say."""
    claims: int = 1
    """Processes that say that they are this rank."""
    slurm_nodes: int | None = None
    """Nodes of the job step, or of the job where no step was made; None outside of SLURM."""
    slurm_tasks: int | None = None
    """Tasks of the step where each is a rank; None where a launcher stands in between."""


def look(scene: Scene) -> WorldFinding:
    """Read the environment."""
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    is_task = os.environ.get("SLURM_PROCID") == os.environ.get("RANK") and local is None
    return WorldFinding(
        world_size=scene.meeting.size,
        local_rank=scene.local_rank,
        local_world_size=int(local) if local else None,
        claims=int(scene.meeting.store.add(f"claims/{scene.rank}", 0)),
        slurm_nodes=_number("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"),
        slurm_tasks=_number("SLURM_STEP_NUM_TASKS") if is_task else None,
    )


def _number(*names: str) -> int | None:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


def judge(told: Told[WorldFinding]) -> list[Row]:
    """Compare what came with what was promised."""
    first = next(iter(told.findings.values()))
    nodes = told.by_node()
    rows = told.unlike(
        "WORLD_SIZE", lambda f: str(f.world_size), "start all ranks by one and the same launcher"
    )
    missing = [rank for rank in range(first.world_size) if rank not in told.findings]
    if missing:
        rows.append(_missing(told, missing, first.world_size))
    rows += _double(told)
    rows += _against_slurm(told, list(nodes))
    if rows:
        return rows
    counts = {node: len(findings) for node, findings in nodes.items()}
    found = f"{first.world_size} ranks on {count_of(len(nodes), 'node')}"
    found += f" ({told.where(told.findings)})"
    if first.world_size == 1:
        found = f"1 rank on {told.places[0].node}, no other is expected"
    if len(set(counts.values())) > 1:
        uneven = ", ".join(f"{count} on {node}" for node, count in counts.items())
        return [told.row(Verdict.WARN, f"{found}: {uneven}", "give each node as many ranks")]
    return [told.row(Verdict.OK, found)]


def _missing(told: Told[WorldFinding], missing: list[int], world_size: int) -> Row:
    names = ", ".join(map(str, missing[:16])) + (", .." if len(missing) > 16 else "")
    return told.row(
        Verdict.FAIL,
        f"{len(missing)} of {world_size} ranks did not come: rank {names}; "
        f"there are {told.where(told.findings)}",
        "see the launcher's output for what became of them; leave their node out",
    )


def _double(told: Told[WorldFinding]) -> list[Row]:
    rows = []
    claimed = [rank for rank, finding in told.findings.items() if finding.claims > 1]
    if claimed:
        rows.append(
            told.row(
                Verdict.FAIL,
                f"several processes say that they are rank {claimed[0]}",
                "one launcher for all nodes, which numbers them; another MASTER_PORT for each job",
            )
        )
    for node, findings in told.by_node().items():
        local = [finding.local_rank for finding in findings.values()]
        double = sorted({number for number in local if local.count(number) > 1})
        if double:
            ranks = [rank for rank, f in findings.items() if f.local_rank == double[0]]
            rows.append(
                told.row(
                    Verdict.FAIL,
                    f"ranks {', '.join(map(str, ranks))} on {node} all have LOCAL_RANK "
                    f"{double[0]}, and so one device",
                    "export LOCAL_RANK for each rank, or start them by torchrun or deepspeed",
                )
            )
    return rows


def _against_slurm(told: Told[WorldFinding], nodes: list[str]) -> list[Row]:
    first = told.findings[min(told.findings)]
    promised = first.slurm_nodes
    if promised is None:
        return []
    rows = []
    if promised != len(nodes):
        rows.append(
            told.row(
                Verdict.FAIL,
                f"SLURM gave {promised} nodes, but all ranks of this world run on "
                f"{len(nodes)} only ({', '.join(nodes[:6])})",
                "each node may train alone (WORLD_SIZE and MASTER_ADDR of the launcher are for one "
                "node: deepspeed needs a hostfile, torchrun --nnodes), or others stand idle",
            )
        )
    expected = first.slurm_tasks
    if expected is None and first.local_world_size is not None:
        expected = promised * first.local_world_size
    if expected is not None and expected != first.world_size:
        what = (
            f"{promised} nodes with {first.local_world_size} ranks each"
            if first.slurm_tasks is None
            else f"{first.slurm_tasks} tasks of SLURM"
        )
        rows.append(
            told.row(
                Verdict.FAIL,
                f"WORLD_SIZE is {first.world_size}, but {what} make {expected}",
                "let WORLD_SIZE be what the launcher or SLURM_NTASKS says",
            )
        )
    return rows


CHECK = Check(name="world", finding=WorldFinding, look=look, judge=judge)
