"""What a run went through: how its starts ended, and which checkpoints are kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tsmoe.checkpoint.layout import META_FILE, find_missing_bytes, read_meta, step_folders
from tsmoe.errors import CheckpointError
from tsmoe.run_folder import EndOfStart


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoint:
    """A checkpoint in the folder of a run."""

    step: int
    saved: str | None
    """When, as ISO 8601 in UTC; None where its `meta.json` is missing."""
    size_bytes: int
    damage: str | None
    """What is missing of it, by the sizes of its files; None if nothing."""


def kept_checkpoints(folder: Path) -> list[KeptCheckpoint]:
    """List the checkpoints of a `checkpoints` folder, oldest first; hashes are not computed."""
    return [_kept(path) for path in step_folders(folder)]


def summarise_end(end: EndOfStart) -> dict[str, Any]:
    """Return how a start ended, as plain JSON."""
    return asdict(end) | {"time": _utc(end.time.timestamp()), "nodes": list(end.nodes)}


def _kept(path: Path) -> KeptCheckpoint:
    meta_file = path / META_FILE
    try:
        damage = find_missing_bytes(path, read_meta(path))
        saved = _utc(meta_file.stat().st_mtime)
    except (CheckpointError, OSError):
        damage, saved = f"{META_FILE} cannot be read", None
    return KeptCheckpoint(
        step=int(path.name.rpartition("_")[2]),
        saved=saved,
        size_bytes=sum(file.stat().st_size for file in path.glob("*") if file.is_file()),
        damage=damage,
    )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
