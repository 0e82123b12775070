"""Pretrain a package from a folder of Parquet series, and forecast tables that it has not seen.

Builds a corpus of every Parquet file in the folder (one series per row), pretrains a preset on it
in one process, exports the package and forecasts each table zero-shot, 672 to 96 steps, by the
usual borders. Started again it goes on where it was.

    python benchmarks/pretrained.py --corpus CORPUS_FOLDER --tables TABLES_FOLDER
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from record import record
from tsmoe.evaluate.baselines import season_length

# A whole step in one pass: the fewest operations around the products.
_ONE_PROCESS = ("engine.type=plain", "training.micro_batch_size=256")
TABLES = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather")


def tsmoe(*arguments: str) -> float:
    """Run a command of the product and return how many seconds it took."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "tsmoe", *arguments], check=True)
    return time.monotonic() - begun


def build_corpus(folder: Path, out: Path) -> float:
    """Build a corpus of every Parquet file in a folder."""
    sources = [
        {"type": "parquet", "path": str(path.resolve()), "source": path.stem, "layout": "series"}
        for path in sorted(folder.glob("*.parquet"))
    ]
    if not sources:
        raise SystemExit(f"{folder}: holds no Parquet file")
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({"sources": sources}), encoding="utf-8")
    return tsmoe("data", "build", str(config), "--out", str(out))


def zero_shot(package: Path, table: Path, out: Path) -> dict[str, Any]:
    """Forecast a table and return the errors of the package and the baselines."""
    # Weather has a double time stamp and a gap; the published tables take its rows as they stand.
    ignored = ["--ignore-time"] if table.stem.lower() == "weather" else []
    season = ["--season", str(season_length("10min"))] if ignored else []
    tsmoe("evaluate", str(package), "--data", str(table), "--json", str(out), *ignored, *season)
    found = json.loads(out.read_text(encoding="utf-8"))
    return {
        row["model"]: {"mse": round(row["mse"], 4), "mae": round(row["mae"], 4)}
        for row in found["results"]
    }


def curve(run: Path) -> dict[str, float]:
    """Return validation losses by step."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, float] = {}
    for values in map(json.loads, lines):
        found |= {str(values["step"] + 1): round(v, 4) for k, v in values.items()
                  if k == "loss/validation"}  # fmt: skip
    return found


def main() -> None:
    """Build, pretrain, export, forecast; write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of Parquet series")
    parser.add_argument("--tables", type=Path, help="folder with ETTh1.parquet and so on")
    parser.add_argument("--preset", default="time_tracker_mini")
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="folder of the run")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    corpus, run, package = args.out / "corpus", args.out / "run", args.out / "package"
    seconds = {"build": build_corpus(args.corpus, corpus)}
    seconds["pretrain"] = tsmoe(
        "pretrain", args.preset, f"corpus={corpus}", f"run={run}", *_ONE_PROCESS, *args.settings
    )
    tsmoe("export", str(run), str(package))
    card = json.loads((package / "card.json").read_text(encoding="utf-8"))
    tables = {}
    for name in TABLES if args.tables else ():
        tables[name] = zero_shot(
            package, args.tables / f"{name}.parquet", args.out / f"{name}.json"
        )
    record(
        "pretrained",
        {
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {part: round(value) for part, value in seconds.items()},
            "card": card,
            "validation_loss": curve(run),
            "zero_shot_672_96": tables,
        },
        notes="one process; seconds of a run that was started again count its last start only",
    )


if __name__ == "__main__":
    main()
