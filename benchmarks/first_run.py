"""What a stranger sees: `make pretrain` in a fresh clone, from nothing and once installed.

Clones the commit at hand into a temporary folder, times the steps of `make pretrain`, removes the
run and times it again. The zero-shot table is the one that the command prints; with --table the
same package is evaluated on other tables too.

    python benchmarks/first_run.py --table ../shared/data/benchmarks/ETTh1.parquet
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, record

_STEP = re.compile(r"^== (.+): done in (\d+) s$", re.MULTILINE)


def make_pretrain(clone: Path) -> dict[str, Any]:
    """Run the command and return its seconds, in all and by step."""
    begun = time.monotonic()
    # Not this process' own environment of Python: the clone makes its own.
    kept = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        ["make", "pretrain"], cwd=clone, env=kept, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"make pretrain failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    steps = {
        label.split(" runs/")[0]: int(seconds) for label, seconds in _STEP.findall(done.stdout)
    }
    return {"seconds": round(time.monotonic() - begun), "steps": steps}


def evaluate(clone: Path, table: Path, context: int, horizon: int) -> dict[str, Any]:
    """Evaluate the package of the run on another table."""
    output = clone / "errors.json"
    subprocess.run(
        [str(clone / ".venv/bin/tsmoe"), "evaluate", "runs/first/package", "--data", str(table),
         "--context", str(context), "--horizon", str(horizon), "--json", str(output)],
        cwd=clone, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads(output.read_text(encoding="utf-8"))


def main() -> None:
    """Time both runs and record them with the tables of errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, action="append", default=[])
    parser.add_argument("--context", type=int, default=672)
    parser.add_argument("--horizon", type=int, default=96)
    args = parser.parse_args()
    tables = [path.resolve() for path in args.table]
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "tsmoe"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        results: dict[str, Any] = {"from_nothing": make_pretrain(clone)}
        shutil.rmtree(clone / "runs")
        results["installed"] = make_pretrain(clone)
        lines = (clone / "runs/first/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in lines if '"loss/train"' in line]
        waits = [step["speed/data_wait_share"] for step in steps]
        results["training"] = {
            "steps": len(steps),
            "points_per_second_median": sorted(s["speed/points_per_second"] for s in steps)[
                len(steps) // 2
            ],
            "data_wait_share_mean": sum(waits) / len(waits),
        }
        card = json.loads((clone / "runs/first/package/card.json").read_text(encoding="utf-8"))
        results["package"] = {key: card[key] for key in ("parameters", "points_seen", "metrics")}
        results["zero_shot"] = json.loads((clone / "runs/first/zero_shot.json").read_text())
        results["zero_shot_elsewhere"] = [
            evaluate(clone, table, args.context, args.horizon) | {"data": table.name}
            for table in tables
        ]
    record("first_run", results, notes="two ranks, expert parallel, one thread each")


if __name__ == "__main__":
    main()
