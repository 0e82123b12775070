"""Has every rank a device of its own, whole, and like those of the others?"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field

import torch

from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import GIB, Check, Row, Told, Verdict
from tsmoe.ranks import choose_device

_QUERY_SECONDS = 20
# Of its memory, that others may hold before it is worth a word.
_OCCUPIED_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class GpuFinding:
    """The device that a rank would train on."""

    kind: str
    """cpu or cuda."""
    visible: int = 0
    """GPUs that this rank sees."""
    name: str = ""
    uuid: str = ""
    total_bytes: int = 0
    free_bytes: int = 0
    others: list[str] = field(default_factory=list)
    """Processes of others on it, as "pid (MiB)"."""


def look(scene: Scene) -> GpuFinding:
    """Choose the device as training does, and look at it."""
    device = choose_device(scene.config.training.device, scene.local_rank)
    visible = torch.cuda.device_count()
    if device.type != "cuda":
        return GpuFinding(kind=device.type, visible=visible)
    properties = torch.cuda.get_device_properties(device)
    uuid = f"GPU-{properties.uuid}"
    free, total = torch.cuda.mem_get_info(device)
    return GpuFinding(
        kind=device.type,
        visible=visible,
        name=properties.name,
        uuid=uuid,
        total_bytes=total,
        free_bytes=free,
        others=processes_of_others(
            _nvidia_smi("--query-compute-apps=gpu_uuid,pid,used_memory"), uuid, os.getpid()
        ),
    )


def driver_version() -> str | None:
    """Ask the driver for its version; None where it cannot be asked."""
    lines = _nvidia_smi("--query-gpu=driver_version").splitlines()
    return lines[0].strip() if lines else None


def processes_of_others(listing: str, uuid: str, own: int) -> list[str]:
    """Read nvidia-smi's lines "uuid, pid, MiB" for one GPU, this process left out.

    In a container it lists processes by numbers that are not known here; then one of them is ours.
    """
    rows = [[word.strip() for word in line.split(",")] for line in listing.splitlines()]
    found = {row[1]: row[2] for row in rows if len(row) == 3 and row[0] == uuid}
    if str(own) in found:
        del found[str(own)]
    elif found:
        found.popitem()
    return [f"{pid} ({memory} MiB)" for pid, memory in found.items()]


def _nvidia_smi(query: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=_QUERY_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def judge(told: Told[GpuFinding]) -> list[Row]:
    """Look for shared, occupied, idle and unlike devices."""
    kinds = told.groups(lambda f: f.kind)
    if len(kinds) > 1:
        found = "; ".join(f"{kind} on {told.where(ranks)}" for kind, ranks in kinds.items())
        advice = "see nvidia-smi there: no GPU was given, or its driver does not work"
        return [told.row(Verdict.FAIL, f"ranks are on different kinds of device: {found}", advice)]
    first = next(iter(told.findings.values()))
    if first.kind == "cpu":
        idle = told.groups(lambda f: f.visible > 0).get(True, [])
        if idle:
            found = f"training on CPU, though {told.where(idle)} has GPUs"
            return [told.row(Verdict.WARN, found, "set training.device=auto to use them")]
        return [told.row(Verdict.OK, "no GPU, training on CPU")]
    rows = _shared(told) + _occupied(told) + _unlike(told)
    if all(row.verdict is Verdict.WARN for row in rows):
        least = min(f.free_bytes for f in told.findings.values()) / GIB
        names = ", ".join(
            f"{len(ranks)} x {name}" for name, ranks in told.groups(lambda f: f.name).items()
        )
        found = f"{names}, {first.total_bytes / GIB:.1f} GiB, at least {least:.1f} GiB free"
        rows.insert(0, told.row(Verdict.OK, found))
    return rows


def _shared(told: Told[GpuFinding]) -> list[Row]:
    rows = []
    for uuid, ranks in told.groups(lambda f: f.uuid).items():
        if len(ranks) > 1:
            found = (
                f"ranks {', '.join(map(str, ranks))} share one GPU: {uuid} of {told.where(ranks)}"
            )
            advice = "one rank per GPU: look at CUDA_VISIBLE_DEVICES and LOCAL_RANK of the launcher"
            rows.append(told.row(Verdict.FAIL, found, advice))
    return rows


def _occupied(told: Told[GpuFinding]) -> list[Row]:
    rows = []
    for rank, finding in told.findings.items():
        held = finding.total_bytes - finding.free_bytes
        if finding.others or held > _OCCUPIED_SHARE * finding.total_bytes:
            processes = f", by {', '.join(finding.others)}" if finding.others else ""
            found = (
                f"{told.where([rank])}: {held / GIB:.1f} of {finding.total_bytes / GIB:.1f} GiB "
                f"are held{processes}"
            )
            rows.append(told.row(Verdict.WARN, found, "end those processes, or leave the node out"))
    return rows


def _unlike(told: Told[GpuFinding]) -> list[Row]:
    rows = []
    models = told.groups(lambda f: f"{f.name} of {f.total_bytes / GIB:.0f} GiB")
    if len(models) > 1:
        found = "; ".join(f"{name} on {told.where(ranks)}" for name, ranks in models.items())
        rows.append(told.row(Verdict.WARN, f"GPUs differ: {found}", "all wait for the slowest"))
    for node, findings in told.by_node().items():
        visible = max(finding.visible for finding in findings.values())
        if visible > len(findings):
            found = f"{node} has {visible} GPUs for {len(findings)} ranks"
            rows.append(told.row(Verdict.WARN, found, f"start {visible} ranks there"))
    return rows


CHECK = Check(name="device", finding=GpuFinding, look=look, judge=judge)
