"""Write what a benchmark found, with what one needs to judge it: machine, versions, date."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parent.parent
_PACKAGES = ("torch", "deepspeed", "accelerate", "numpy", "pyarrow", "datasets")


def record(name: str, results: dict[str, Any], *, notes: str = "") -> Path:
    """Write `results/NAME.json`, replacing an older one, and return its path."""
    document = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "machine": _machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "notes": notes,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=1))
    print(f"written to {path.relative_to(ROOT)}")
    return path


def _commit() -> str:
    found = _git("rev-parse", "--short", "HEAD").stdout.strip()
    # What earlier cells wrote is no change of the code.
    is_changed = _git(
        "diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results"
    ).returncode
    return f"{found}{'-dirty' if is_changed else ''}" if found else "unknown"


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)


def _machine() -> dict[str, Any]:
    import torch

    cpu = ""
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        lines = cpu_info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus,
        "load_average": os.getloadavg()[0],
    }
