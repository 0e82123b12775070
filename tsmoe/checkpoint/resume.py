"""Find the checkpoint to go on from, and say why it may not be used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tsmoe.checkpoint.layout import (
    LATEST_FILE,
    META_FILE,
    CheckpointMeta,
    find_damage,
    read_meta,
    step_folders,
)
from tsmoe.errors import CheckpointError

logger = logging.getLogger(__name__)


def newest_checkpoint(folder: Path) -> tuple[Path, CheckpointMeta] | None:
    """Return the newest whole checkpoint of a `checkpoints` folder, or None if there is none.

    What `latest` names is tried first, but for checkpoints that were written after it: a run that
    was killed between the two has them. A damaged checkpoint is passed over with a warning that
    says what is wrong with it.
    """
    candidates = step_folders(folder)[::-1]
    latest = folder / LATEST_FILE
    if latest.exists():
        named = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
        if named in candidates:
            written = latest.stat().st_mtime_ns
            newer = [path for path in candidates if path > named and _written(path) > written]
            first = [*newer, named]
            candidates = [*first, *(path for path in candidates if path not in first)]
        else:
            logger.warning(
                "%s names %s, which is not there; looking for others", latest, named.name
            )
    for candidate in candidates:
        try:
            meta = read_meta(candidate)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            continue
        damage = find_damage(candidate, meta)
        if damage is None:
            return candidate, meta
        logger.warning("passed over: %s: %s", candidate, damage)
    if candidates:
        raise CheckpointError(
            f"{folder}: none of {len(candidates)} checkpoints is whole (reasons above); "
            "restore one from a copy, or start a new run with another run="
        )
    return None


def _written(checkpoint: Path) -> int:
    """When a checkpoint was committed, in nanoseconds; 0 for one without a record."""
    try:
        return (checkpoint / META_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def open_checkpoint(path: Path) -> tuple[Path, CheckpointMeta]:
    """Find a checkpoint by its own folder or that of its run, and check that it is whole.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; name a run folder or a checkpoint in it")
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (found := newest_checkpoint(folder)) is not None:
            return found
    meta = read_meta(path)
    if damage := find_damage(path, meta):
        raise CheckpointError(f"{path}: {damage}; use another checkpoint")
    return path, meta


def check_same_model(meta: CheckpointMeta, config: dict[str, Any], folder: Path) -> None:
    """Compare the model sections of a checkpoint and of the run that wants to continue it.

    Raises:
        CheckpointError: naming each differing key with both values.
    """
    from tsmoe.models.older import complete_model  # torch, which `tsmoe status` does without

    saved = complete_model(meta.config["model"])
    differences = _differences(saved, config["model"], "model")
    if differences:
        raise CheckpointError(
            f"{folder}: a checkpoint of another model: {'; '.join(differences)}; "
            "choose another run= or the same settings"
        )


def _differences(saved: Any, wanted: Any, path: str) -> list[str]:
    if isinstance(saved, dict) and isinstance(wanted, dict):
        keys = sorted(saved.keys() | wanted.keys())
        return [d for k in keys for d in _differences(saved.get(k), wanted.get(k), f"{path}.{k}")]
    return [] if saved == wanted else [f"{path} is {saved!r} there and {wanted!r} here"]
