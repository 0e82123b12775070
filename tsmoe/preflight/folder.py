"""Do all nodes see one run folder, can they write there, and is there room?

Files are written beside those of a run that may be there, and removed; of the run nothing changes.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tsmoe.checkpoint.layout import STATE_KINDS, step_folders, sync_folder
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import GIB, Check, Row, Told, Verdict
from tsmoe.train.run_config import RunConfig

_PROBE_BYTES = 32 << 20
# A network file system may show a new name late.
_PATIENCE_SECONDS = 10.0
_PREFIX = ".tsmoe-preflight-"


@dataclass(frozen=True, kw_only=True)
class FolderFinding:
    """What a node found in the run folder, and in the cache."""

    folder: str
    sees_first: bool
    """Whether the file that the first rank wrote is there."""
    problem: str = ""
    """Why it cannot write there."""
    unseen: list[int] = field(default_factory=list)
    """Of the first rank: those whose files are not there, though they wrote them."""
    bytes_per_second: float = 0.0
    """Of the first rank: written and pushed to the disk."""
    free_bytes: int
    needed_bytes: int
    """For the checkpoints that are still to come."""
    minimum_bytes: int
    """That shall be left beside them."""
    cache: str
    cache_free_bytes: int
    cache_is_writable: bool


def look(scene: Scene) -> FolderFinding:
    """Write, and look for what the others wrote."""
    run = Path(scene.config.run)
    with _folder_for_now(run) if scene.meeting.is_first else _nothing():
        sees, problem, unseen, rate = (_look_first if scene.meeting.is_first else _look_other)(
            scene, run
        )
    cache = _existing(scene.options.cache)
    return FolderFinding(
        folder=str(run.absolute()),
        sees_first=sees,
        problem=problem,
        unseen=unseen,
        bytes_per_second=rate,
        free_bytes=shutil.disk_usage(_existing(run)).free,
        needed_bytes=needed_bytes(scene.config, run / "checkpoints"),
        minimum_bytes=int(scene.options.minimum_free_gib * GIB),
        cache=str(scene.options.cache),
        cache_free_bytes=shutil.disk_usage(cache).free,
        cache_is_writable=os.access(cache, os.W_OK | os.X_OK),
    )


_Look = tuple[bool, str, list[int], float]


def _look_first(scene: Scene, run: Path) -> _Look:
    """Write the file that the others look for, and look for theirs."""
    meeting, token = scene.meeting, secrets.token_hex(8)
    others = [rank for rank in scene.node_leaders if rank != meeting.rank]
    try:
        scene.doing = f"writing to {run}"
        rate = _write_probe(run / f"{_PREFIX}{token}", token)
        meeting.tell("folder/token", token)
        written = meeting.gather(meeting.said("folder/written", others), scene.wait_seconds)
        scene.doing = f"looking for what the other nodes wrote to {run}"
        unseen = [
            rank
            for rank in others
            if written.get(rank) and not _appears(_own(run, token, rank).exists)
        ]
        return True, "", unseen, rate
    except OSError as error:
        meeting.tell("folder/token", None)
        return False, str(error), [], 0.0
    finally:
        for path in run.glob(f"{_PREFIX}{token}*"):
            path.unlink(missing_ok=True)
        meeting.tell("folder/done", True)


def _look_other(scene: Scene, run: Path) -> _Look:
    """Look for the first rank's file, and write one."""
    meeting = scene.meeting
    scene.doing = "waiting for the first rank to write to the run folder"
    token = meeting.ask("folder/token", scene.wait_seconds)
    if token is None:
        meeting.tell(f"folder/written/{meeting.rank}", False)
        return True, "", [], 0.0  # the first rank says what is wrong
    scene.doing = f"looking for what the first rank wrote to {run}"
    probe, own = run / f"{_PREFIX}{token}", _own(run, token, meeting.rank)
    sees, problem = _appears(lambda: probe.exists() and _ends_with(probe, token)), ""
    if sees:
        try:
            _write(own, token.encode())
        except OSError as error:
            problem = str(error)
    meeting.tell(f"folder/written/{meeting.rank}", sees and not problem)
    meeting.ask("folder/done", scene.wait_seconds)
    own.unlink(missing_ok=True)
    return sees, problem, [], 0.0


def _own(run: Path, token: str, rank: int) -> Path:
    return run / f"{_PREFIX}{token}-{rank}"


def _write_probe(path: Path, token: str) -> float:
    """Write a file as a checkpoint is written, and return bytes a second."""
    content = os.urandom(_PROBE_BYTES) + token.encode()
    begun = time.perf_counter()
    unfinished = path.with_name(f"{path.name}-unfinished")
    _write(unfinished, content)
    unfinished.rename(path)
    sync_folder(path.parent)
    return _PROBE_BYTES / (time.perf_counter() - begun)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _ends_with(path: Path, token: str) -> bool:
    with path.open("rb") as file:
        file.seek(-len(token), os.SEEK_END)
        return file.read() == token.encode()


def _appears(is_there: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@contextmanager
def _folder_for_now(folder: Path) -> Iterator[None]:
    """Make a folder, and remove again what was made of it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with suppress(OSError):  # writing there says why
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def needed_bytes(config: RunConfig, checkpoints: Path) -> int:
    """Say how much disk the checkpoints of a run still take.

    Those that are kept, one that is written meanwhile, and the milestones.
    """
    numel = sum(parameter.numel for parameter in parameter_sizes(config.model))
    settings, training = config.checkpoint, config.training
    saves = math.ceil(training.steps / settings.every_steps)
    count = min(saves, settings.keep) + 1
    if settings.milestone_every_steps is not None:
        both = math.lcm(settings.milestone_every_steps, settings.every_steps)
        count += training.steps // both
    there = sum(
        file.stat().st_size for folder in step_folders(checkpoints) for file in folder.iterdir()
    )
    return max(0, count * len(STATE_KINDS) * 4 * numel - there)


def judge(told: Told[FolderFinding]) -> list[Row]:
    """Look for nodes that see another folder, and for full disks."""
    rows = _shared(told)
    if not rows:
        first = told.findings[min(told.findings)]
        found = f"{first.folder}: written at {first.bytes_per_second / 1e6:,.0f} MB/s"
        nodes = len(told.by_node())
        if nodes > 1:
            found += f", one and the same on {nodes} nodes"
        rows = [told.row(Verdict.OK, found)]
    return rows + _room(told)


def _shared(told: Told[FolderFinding]) -> list[Row]:
    first = min(told.findings)
    folder, node = told.findings[first].folder, told.places[first].node
    advice = "put run= on a file system that all nodes share"
    blind = [rank for rank, f in told.findings.items() if not f.sees_first and not f.problem]
    rows = []
    if blind:
        found = f"{told.where(blind)} does not see in {folder} what {node} wrote there"
        other = sorted({told.findings[rank].folder for rank in blind} - {folder})
        found += f"; its folder is {', '.join(other)}" if other else ""
        rows.append(told.row(Verdict.FAIL, found, advice))
    if unseen := told.findings[first].unseen:
        found = f"{node} does not see in {folder} what {told.where(unseen)} wrote there"
        rows.append(told.row(Verdict.FAIL, found, advice))
    for problem, ranks in told.groups(lambda f: f.problem).items():
        if problem:
            found = f"{told.where(ranks)} cannot write to {folder}: {problem}"
            rows.append(
                told.row(Verdict.FAIL, found, "mend its permissions, or choose another run=")
            )
    return rows


def _room(told: Told[FolderFinding]) -> list[Row]:
    first = told.findings[min(told.findings)]
    least = min(told.findings.values(), key=lambda f: f.free_bytes)
    found = (
        f"{least.free_bytes / GIB:,.1f} GiB free in {least.folder}, checkpoints take "
        f"{first.needed_bytes / GIB:,.2f} GiB more"
    )
    rows = []
    if least.free_bytes < first.needed_bytes + first.minimum_bytes:
        found += f", and {first.minimum_bytes / GIB:g} GiB shall be left"
        advice = "free some space, lower checkpoint.keep, or choose another run="
        rows.append(Row(check="disk", verdict=Verdict.FAIL, found=found, advice=advice))
    for rank, finding in told.findings.items():
        cache = f"{told.places[rank].node}: cache {finding.cache}"
        if not finding.cache_is_writable:
            cache += " cannot be written"
        elif finding.cache_free_bytes < finding.minimum_bytes:
            cache += f" has {finding.cache_free_bytes / GIB:,.1f} GiB free"
        else:
            continue
        advice = "set TSMOE_CACHE to a folder with room on a disk of the node"
        rows.append(Row(check="disk", verdict=Verdict.WARN, found=cache, advice=advice))
    return rows or [Row(check="disk", verdict=Verdict.OK, found=found)]


CHECK = Check(name="run folder", finding=FolderFinding, look=look, judge=judge, once_per_node=True)
