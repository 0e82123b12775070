"""Cores and memory of the nodes, and what of them each rank may use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import GIB, Check, Row, Told, Verdict, spans
from tsmoe.ranks import choose_device, share_cores

# Python, torch and its libraries, before a tensor is made.
_BYTES_OF_A_RANK = 2 * GIB
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class HostFinding:
    """What a rank may use of its node."""

    cores: list[int]
    """That it may run on."""
    node_cores: int
    threads: int
    """That torch computes with."""
    total_bytes: int
    """Of memory: of the node, or less where a control group limits it."""
    available_bytes: int


def look(scene: Scene) -> HostFinding:
    """Ask the system."""
    share_cores(choose_device(scene.config.training.device, scene.local_rank), scene.meeting.size)
    memory = psutil.virtual_memory()
    limit = memory_limit(_CONTROL_GROUPS, Path("/proc/self/cgroup").read_text())
    total = min(memory.total, limit or memory.total)
    return HostFinding(
        cores=sorted(os.sched_getaffinity(0)),
        node_cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        total_bytes=total,
        available_bytes=min(memory.available, total),
    )


def memory_limit(root: Path, own: str) -> int | None:
    """Read how many bytes the control group of this process may have; None: no limit.

    Args:
        root: where control groups are mounted.
        own: content of /proc/self/cgroup, of version 1 or 2.
    """
    limits = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (
            root, "memory.max")  # fmt: skip
        parts = Path(path.lstrip("/")).parts
        for depth in range(len(parts) + 1):
            try:
                text = base.joinpath(*parts[:depth], name).read_text().strip()
            except OSError:
                continue
            if text.isdecimal() and int(text) < 1 << 60:  # version 1 says so where there is none
                limits.append(int(text))
    return min(limits, default=None)


def judge(told: Told[HostFinding]) -> list[Row]:
    """Look for ranks that crowd on few cores, and for nodes short of memory."""
    rows = []
    for node, findings in told.by_node().items():
        rows += _cores(told, node, findings)
    short = [
        node
        for node, findings in told.by_node().items()
        if min(f.available_bytes for f in findings.values()) < len(findings) * _BYTES_OF_A_RANK
    ]
    for node in short:
        findings = told.by_node()[node]
        available = min(f.available_bytes for f in findings.values()) / GIB
        found = f"{node}: {available:.1f} GiB of memory are available to {len(findings)} ranks"
        rows.append(
            told.row(Verdict.WARN, found, "ask SLURM for more (--mem=0: all), or end what holds it")
        )
    each = told.groups(_describe)
    found = "; ".join(
        text if len(each) == 1 else f"{told.where(ranks)}: {text}" for text, ranks in each.items()
    )
    return rows or [told.row(Verdict.OK, found)]


def _describe(finding: HostFinding) -> str:
    return (
        f"{len(finding.cores)} of {finding.node_cores} cores and {finding.threads} threads a rank, "
        f"{finding.total_bytes / GIB:.0f} GiB of memory"
    )


def _cores(told: Told[HostFinding], node: str, findings: dict[int, HostFinding]) -> list[Row]:
    union = sorted({core for finding in findings.values() for core in finding.cores})
    node_cores = max(finding.node_cores for finding in findings.values())
    threads = sum(finding.threads for finding in findings.values())
    ranks = len(findings)
    if len(union) < min(ranks, node_cores):
        found = f"{node}: all {ranks} ranks may run on core {spans(union)} only, of {node_cores}"
        advice = (
            "give srun --cpus-per-task (it does not take that of sbatch) or --cpu-bind=none; see "
            "also taskset"
        )
        return [told.row(Verdict.WARN, found, advice)]
    tight = [rank for rank, f in findings.items() if len(f.cores) == 1]
    if tight and node_cores >= 2 * ranks:
        found = f"{told.where(tight)}: one core for each rank, of {node_cores}"
        advice = f"give srun --cpus-per-task={node_cores // ranks} or --cpu-bind=none"
        return [told.row(Verdict.WARN, found, advice)]
    if threads > max(len(union), ranks):
        found = f"{node}: {ranks} ranks compute with {threads} threads on {len(union)} cores"
        advice = f"export OMP_NUM_THREADS={max(1, len(union) // ranks)}"
        return [told.row(Verdict.WARN, found, advice)]
    return []


CHECK = Check(
    name="cores and memory", finding=HostFinding, look=look, judge=judge, needs=("device",)
)
