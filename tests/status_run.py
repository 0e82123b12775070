"""A folder of a run whose every file is made up, with the times that a test wants."""

import json
import os
from pathlib import Path
from typing import Any

import yaml

NOW = 1_800_000_000.0


def step_line(step: int, *, seconds: float = 2.0, points: float = 500.0) -> dict[str, Any]:
    return {
        "step": step,
        "loss/train": 10.0 / (step + 1),
        "speed/step_seconds": seconds,
        "speed/points_per_second": points,
        "experts": {"load": [[1, 2, 3, 4]]},
        "speed/of_step_before": {"compute_seconds": [1.0, 1.0]},
    }


def validation_line(step: int, *, seconds: float = 10.0) -> dict[str, Any]:
    return {"step": step, "loss/validation": 0.5, "speed/validation_seconds": seconds}


def set_age(path: Path, seconds: float) -> None:
    os.utime(path, (NOW - seconds, NOW - seconds))


def write_checkpoint(run: Path, step: int, *, age: float, cut: bool = False) -> Path:
    folder = run / "checkpoints" / f"step_{step:08}"
    folder.mkdir(parents=True)
    (folder / "dense.safetensors").write_bytes(b"x" * (50 if cut else 100))
    record = {"name": "dense.safetensors", "size_bytes": 100, "sha256": "of other bytes"}
    meta = {"format_version": 1, "step": step, "windows_seen": 0, "config": {},
            "corpus_fingerprint": "", "files": [record]}  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    set_age(folder / "meta.json", age)
    (run / "checkpoints" / "latest").write_text(folder.name)
    set_age(run / "checkpoints" / "latest", age)
    set_age(run / "checkpoints", age)
    return folder


def write_ends(run: Path, *ends: dict[str, Any]) -> None:
    usual = {"time": "2026-01-01T00:00:00+00:00", "job": "7", "restart": 0, "exit_code": 1,
             "outcome": "crashed", "step_before": 0, "step": 20, "nodes": ["n1"],
             "decision": "restart", "reason": "rank 1 was killed"}  # fmt: skip
    text = "".join(json.dumps(usual | end) + "\n" for end in ends)
    (run / "restarts.jsonl").write_text(text)


def write_run(
    run: Path,
    *,
    steps: int = 30,
    silent: float = 3.0,
    started: float = 5000.0,
    lines: list[dict[str, Any]] | None = None,
) -> Path:
    """Write a run of `steps` steps that last wrote something `silent` seconds ago."""
    run.mkdir()
    config = {"training": {"steps": 100, "validate_every_steps": 20}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    if lines is None:
        lines = [step_line(step) for step in range(steps)]
        lines.insert(min(20, len(lines)), validation_line(19))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / ".lock").write_text("")
    set_age(run / ".lock", started)
    set_age(run / "config.yaml", started - 1)
    set_age(run / "metrics.jsonl", silent)
    return run
