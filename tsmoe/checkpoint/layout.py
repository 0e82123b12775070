"""Names and records of a checkpoint folder: what is where, and how one knows that it is whole.

    step_00000400/
        dense.safetensors            what every rank holds: `KIND/PARAMETER`, `buffer/NAME`
        experts-00000.safetensors    one per expert-parallel rank: `KIND/PARAMETER/ID`
        meta.json                    written last: step, config, corpus, sha256 of each file

KIND is `value` (float32 master), `exp_avg` or `exp_avg_sq` (Adam moments). Experts are addressed by
their global id, so the number of ranks that wrote them is of no concern to who reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsmoe.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
META_FILE = "meta.json"
DENSE_FILE = "dense.safetensors"
LATEST_FILE = "latest"
INCOMPLETE_PREFIX = ".incomplete-"
_STEP_FOLDER = re.compile(r"step_\d{8}")
STATE_KINDS = ("value", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """What a file must be to be whole."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says of itself beside its tensors."""

    step: int
    """Optimizer steps done."""
    windows_seen: int
    """Position in the order of windows; the random state is a function of seed and step."""
    config: dict[str, Any]
    """The resolved run configuration."""
    corpus_fingerprint: str
    stream: list[dict[str, Any]] | None = None
    """Where each rank stands in a streamed data set; None for a corpus, whose order is a function
    of `windows_seen`."""
    guard: dict[str, Any] | None = None
    """What a fine-tuning run remembers of its validations; None in pretraining."""
    not_finite: list[dict[str, Any]] = field(default_factory=list)
    """Steps whose loss or gradient was not finite, and what followed, see `NotFinitePolicy`."""
    files: tuple[FileRecord, ...] = ()
    format_version: int = FORMAT_VERSION

    @property
    def updates(self) -> int:
        """Optimizer updates done: steps without those that were skipped."""
        return self.step - sum(event["action"] == "skip" for event in self.not_finite)

    def write(self, folder: Path) -> None:
        """Write meta.json and push it to the disk."""
        write_text(folder / META_FILE, json.dumps(asdict(self), indent=1))


def step_folder(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:08d}"


def step_folders(folder: Path) -> list[Path]:
    """Return the folders of all steps, oldest first; copies under other names are not looked at."""
    return sorted(path for path in folder.glob("step_*") if _STEP_FOLDER.fullmatch(path.name))


def experts_file(expert_parallel_rank: int) -> str:
    """Name of the file of one expert-parallel rank."""
    return f"experts-{expert_parallel_rank:05d}.safetensors"


def read_meta(folder: Path) -> CheckpointMeta:
    """Read what a checkpoint says of itself.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format version.
    """
    path = folder / META_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version == FORMAT_VERSION:
            files = tuple(FileRecord(**record) for record in values.pop("files"))
            return CheckpointMeta(**values, files=files)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {META_FILE}, so this is no whole checkpoint; "
            "name a folder such as runs/NAME or runs/NAME/checkpoints/step_00000400"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); use an older checkpoint"
        ) from error
    raise CheckpointError(
        f"{path}: format version {version}, but this tsmoe reads {FORMAT_VERSION}; "
        "use the version of tsmoe that wrote it"
    )


def find_damage(folder: Path, meta: CheckpointMeta) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None if it is whole."""
    if damage := find_missing_bytes(folder, meta):
        return damage
    for record in meta.files:
        try:
            if sha256_of(folder / record.name) != record.sha256:
                return f"{record.name} was altered: its sha256 differs from {META_FILE}"
        except OSError as error:
            return f"{record.name} cannot be read ({error.strerror})"
    return None


def find_missing_bytes(folder: Path, meta: CheckpointMeta) -> str | None:
    """Say which file is missing or of another size, or None; nothing is read, so it is quick."""
    for record in meta.files:
        try:
            size = (folder / record.name).stat().st_size
        except FileNotFoundError:
            return f"{record.name} is missing"
        except OSError as error:
            return f"{record.name} cannot be read ({error.strerror})"
        if size != record.size_bytes:
            return f"{record.name} has {size} bytes instead of {record.size_bytes}"
    return None


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old one or the new one, whole.

    Raises:
        CheckpointError: if it cannot be written, as on a full disk.
    """
    temporary = path.with_name(f"{INCOMPLETE_PREFIX}{path.name}")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be written ({error}); free some space or mend the folder, and start "
            "the same command again"
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and push it to the disk, readable by whom other files are.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    from safetensors.torch import save_file  # torch: who only reads names does without it

    # safetensors makes its files readable by their owner alone.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path)
    path.chmod(mode)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Push the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
