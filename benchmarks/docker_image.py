"""The docker image: time to build, cold and after a change of our code, size, the first run in it.

Builds the commit at hand from a fresh clone, then runs `.ci/pretrain` in a container as the image's
ordinary user: embedded corpus, two ranks under the deepspeed launcher, export, zero-shot table.
Which program builds is said by the variables of container_builder.py.

    TSMOE_IMAGE_BUILDER=docker python benchmarks/docker_image.py
    TSMOE_IMAGE_BUILDER=docker python benchmarks/docker_image.py --variant cuda
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from container_builder import WORKSPACE, ContainerBuilder
from record import ROOT, record

TAG = "tsmoe-measured"
UID = 1000
VARIANTS: dict[str, list[str]] = {"cpu": [], "cuda": ["--build-arg", "CUDA=1"]}

_STEP = re.compile(r"^== (.+): done in (\d+) s$", re.MULTILINE)


def seconds_to_build(builder: ContainerBuilder, context: Path, *options: str) -> float:
    """Build and return how long it took."""
    begun = time.monotonic()
    builder.build(TAG, context, *options)
    return round(time.monotonic() - begun, 1)


def megabytes(builder: ContainerBuilder) -> dict[str, int]:
    """Measure what the image holds, in MB on disk, by part."""
    folders = {"all": "/", "packages": "/opt/venv", "torch": "/opt/venv/lib/python*/*/torch"}
    sizes = {}
    for name, folder in folders.items():
        command = f"du -sx --block-size=1000000 {folder} 2>/dev/null | cut -f1"
        printed = builder.run(TAG, ["sh", "-c", command], user="0", uses_entrypoint=False).stdout
        sizes[name] = int(printed)
    return sizes


def seconds_of(builder: ContainerBuilder, words: list[str]) -> float:
    """Time one command in a fresh container; the second run counts, with the files in memory."""
    for _ in range(2):
        begun = time.monotonic()
        done = builder.run(TAG, words)
    if done.returncode:
        raise SystemExit(f"{words} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return round(time.monotonic() - begun, 1)


def main_job(builder: ContainerBuilder, folder: Path) -> dict[str, Any]:
    """Run the README's main job as the image's user, and return its times and its table."""
    os.chown(folder, UID, UID)
    begun = time.monotonic()
    done = builder.run(TAG, ["sh", ".ci/pretrain"], mounts={folder: f"{WORKSPACE}/runs"})
    if done.returncode:
        raise SystemExit(f".ci/pretrain failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    table = json.loads((folder / "first/zero_shot.json").read_text(encoding="utf-8"))
    owners = {path.stat().st_uid for path in folder.rglob("*")}
    return {
        "seconds": round(time.monotonic() - begun),
        "steps": {label: int(seconds) for label, seconds in _STEP.findall(done.stdout)},
        "files_belong_to_uid": sorted(owners),
        "zero_shot": [{k: row[k] for k in ("model", "mse", "mae")} for row in table["results"]],
    }


def main() -> None:
    """Build, measure, run, record, and remove the image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="cpu")
    parser.add_argument("--note", default="", help="what a reader of the result must know")
    args = parser.parse_args()
    builder = ContainerBuilder.from_environment()
    if builder is None:
        parser.error("TSMOE_IMAGE_BUILDER is not set; set it to docker, podman or buildah")
    options = VARIANTS[args.variant]
    with tempfile.TemporaryDirectory() as name:
        clone, runs = Path(name) / "tsmoe", Path(name) / "runs"
        runs.mkdir()
        Path(name).chmod(0o755)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        results: dict[str, Any] = {"builder": builder.version(), "variant": args.variant}
        built = {"cold": seconds_to_build(builder, clone, "--no-cache", *options)}
        built["nothing_changed"] = seconds_to_build(builder, clone, *options)
        with (clone / "tsmoe/__init__.py").open("a", encoding="utf-8") as changed:
            changed.write("\n# changed\n")
        built["our_code_changed"] = seconds_to_build(builder, clone, *options)
        results["build_seconds"] = built
        results["megabytes"] = megabytes(builder)
        results["version_seconds"] = seconds_of(builder, ["--version"])
        results["main_job"] = main_job(builder, runs)
        settings = builder.settings(TAG)
        results["settings"] = {key: settings.get(key) for key in ("User", "Entrypoint")}
        builder.remove(TAG)
    suffix = "" if args.variant == "cpu" else f"_{args.variant}"
    record(f"docker_image{suffix}", results, notes=args.note)


if __name__ == "__main__":
    main()
