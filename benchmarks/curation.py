"""Build a corpus of real data with the default curation, and audit it against evaluation tables.

Run: python benchmarks/curation.py DATA, a folder that holds corpus/*.parquet (one series a row),
benchmarks/*.parquet and tasks/*/*.parquet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from record import ROOT, record


def run(arguments: list[str], accepts: tuple[int, ...] = (0,)) -> tuple[dict[str, Any], float]:
    """Run a command of the program; return its JSON and the seconds it took."""
    begun = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-m", "tsmoe", "data", *arguments, "--json"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    if process.returncode not in accepts:
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}")
    return json.loads(process.stdout), time.monotonic() - begun


def main() -> None:
    """Build, list what was dropped, and audit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data.resolve()
    tables = [*sorted(data.glob("benchmarks/*.parquet")), *sorted(data.glob("tasks/*/*.parquet"))]
    with tempfile.TemporaryDirectory() as name:
        config, out = Path(name) / "corpus.yaml", str(Path(name) / "corpus")
        config.write_text(f"sources: [{{type: parquet, path: '{data}/corpus/*.parquet'}}]")
        summary, build_seconds = run(["build", str(config), "--out", out])
        status, _ = run(["status", out])
        audit, audit_seconds = run(["audit", out, "--against", *map(str, tables)], accepts=(0, 3))
        seen = pq.read_table(
            Path(out) / "curation" / "series.parquet", columns=["item_id", "copy_of"]
        ).to_pylist()
    drops = {
        reason: {source: entry["count"] for source, entry in drops["sources"].items()}
        for reason, drops in status["drops"].items()
    }
    record(
        "curation",
        {
            "series": summary["series"],
            "points": summary["points"],
            "dropped": summary["dropped"],
            "build_seconds": round(build_seconds, 1),
            "drops": drops,
            "copies": {row["item_id"]: row["copy_of"] for row in seen if row["copy_of"]},
            "audit_seconds": round(audit_seconds, 1),
            "audit": {
                Path(table["table"]).name: {key: table[key] for key in table if key != "table"}
                for table in audit["tables"]
            },
        },
    )


if __name__ == "__main__":
    main()
