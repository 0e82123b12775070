"""Does every rank run the same programs?"""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tsmoe
from tsmoe.preflight.gpu import driver_version
from tsmoe.preflight.scene import Scene
from tsmoe.preflight.verdict import Check, Row, Told, Verdict

_PACKAGES = ("tsmoe", "data_pipeline", "launcher")
_SOURCES = ("*.py", "*.yaml")


@dataclass(frozen=True, kw_only=True)
class SoftwareFinding:
    """Versions of what decides a run; None: not there."""

    python: str
    torch: str
    deepspeed: str | None
    tsmoe: str
    code: str
    """Hash of the sources of all packages of the product."""
    folder: str
    """Where they lie."""
    cuda: str | None = None
    nccl: str | None = None
    driver: str | None = None


def look(_scene: Scene) -> SoftwareFinding:
    """Read versions and hash the sources."""
    has_cuda = torch.cuda.is_available()
    nccl = torch.cuda.nccl.version() if has_cuda else None
    return SoftwareFinding(
        python=platform.python_version(),
        torch=torch.__version__,
        deepspeed=_version("deepspeed"),
        tsmoe=tsmoe.__version__,
        code=source_hash([_folder(package) for package in _PACKAGES]),
        folder=str(_folder("tsmoe")),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl)) if nccl is not None else None,
        driver=driver_version() if has_cuda else None,
    )


def source_hash(packages: list[Path]) -> str:
    """Hash names and content of the source files of packages, wherever they are installed."""
    digest = hashlib.sha256()
    for package in packages:
        files = sorted(path for pattern in _SOURCES for path in package.rglob(pattern))
        for path in files:
            content = path.read_bytes()
            name = f"{package.name}/{path.relative_to(package).as_posix()}"
            digest.update(f"{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _folder(package: str) -> Path:
    # Beside one another: a look-up by name may find another folder of that name on the path.
    return Path(tsmoe.__file__).parents[1] / package


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def judge(told: Told[SoftwareFinding]) -> list[Row]:
    """Fail where two ranks differ."""
    rows = []
    for name in ("python", "torch", "deepspeed", "tsmoe", "cuda", "nccl", "driver"):
        rows += told.unlike(
            name,
            lambda f, name=name: getattr(f, name) or "none",  # type: ignore[misc]
            "install the same on all nodes, or start from one shared environment or image",
            # CUDA works across drivers, as long as each is new enough.
            verdict=Verdict.WARN if name == "driver" else Verdict.FAIL,
        )
    if len(told.groups(lambda f: f.code)) > 1:
        rows += told.unlike(
            "the code of tsmoe",
            lambda f: f"{f.code[:12]} ({f.folder})",
            "install the same commit on all nodes; look at PYTHONPATH",
        )
    if rows:
        return rows
    f = next(iter(told.findings.values()))
    parts = [f"python {f.python}", f"torch {f.torch}", f"deepspeed {f.deepspeed or 'none'}"]
    parts += [f"tsmoe {f.tsmoe} (code {f.code[:12]})"]
    parts += [f"CUDA {f.cuda}, NCCL {f.nccl}, driver {f.driver}"] if f.nccl else []
    return [told.row(Verdict.OK, ", ".join(parts))]


CHECK = Check(name="software", finding=SoftwareFinding, look=look, judge=judge)
