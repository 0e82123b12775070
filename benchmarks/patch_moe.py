"""Train PatchMoE on the sets of a task, with the routers that are to be compared, over seeds.

Each cell of the results is one `tsmoe finetune` command, which they name; started again, runs that
are done are not repeated. Writes results/patch_moe_TASK.json and a Markdown table beside it, and a
picture where there are several routers and seeds.

    python benchmarks/patch_moe.py classification --data FOLDER --routers recurrent,linear
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patch_moe_tables import draw, markdown
from record import RESULTS, record
from tsmoe.evaluate.baselines import season_length

PRESETS = RESULTS.parents[1] / "tsmoe" / "presets" / "finetune"
ROUTER = "model.feed_forward.router"
# What each router is, over the preset's recurrent one with noise and one memory for all layers. The
# dense twin is as wide as what a token passes.
ROUTERS: dict[str, list[str]] = {
    "recurrent": [],
    "no_noise": [f"{ROUTER}.noise=0"],
    "memory_per_layer": [f"{ROUTER}.shares_memory=false"],
    "linear": [f"{ROUTER}={{type: linear, top_k: 2}}"],
    "linear_noise": [f"{ROUTER}={{type: linear, top_k: 2, noise: 1.0}}"],
    "dense": [
        "model.feed_forward={type: dense, d_ff: WIDTH}",
        "balance_loss.alpha=0",
        "balance_loss.beta=0",
    ],
}
# Double time stamps and gaps; the published tables take the rows as they stand.
AS_IT_STANDS = {"weather": "10min", "exchange_rate": "D"}


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The sets of a task."""

    preset: str
    task: str
    folder: str
    sets: dict[str, list[str]]
    """Settings by set; its file is named like it, up to a colon."""
    figures: tuple[str, ...]
    """Of the table."""
    settings: list[str] = field(default_factory=list)


def of_router(router: str, settings: list[str]) -> list[str]:
    """Return a set's settings and those of a router, without sizes of what it does not have."""
    lost = {"linear": f"{ROUTER}.", "linear_noise": f"{ROUTER}.", "dense": "model.feed_forward."}
    left_out = lost.get(router)
    kept = [text for text in settings if left_out is None or not text.startswith(left_out)]
    width = 96 if NARROW[0] in settings else 384
    return kept + [text.replace("WIDTH", str(width)) for text in ROUTERS[router]]


def _tables(task: str, names: tuple[str, ...]) -> dict[str, list[str]]:
    found = {}
    for name in names:
        settings = []
        if name in AS_IT_STANDS:
            settings.append(f"tasks.{task}.ignores_time=true")
            if task == "forecast":
                settings.append(f"tasks.{task}.season={season_length(AS_IT_STANDS[name])}")
        found[name] = settings
    return found


def _horizons(
    tables: dict[str, list[str]], horizons: tuple[int, ...], contexts: tuple[int, ...]
) -> dict[str, list[str]]:
    return {
        f"{name}:{horizon}:{context}": [
            *settings,
            *SMALL_TABLES.get(name, []),
            *(FAR if horizon == 720 and name in ("ETTh1", "ETTh2") else []),
            *(LEARNED if horizon == 96 and name == "weather" else []),
            f"tasks.forecast.prediction_length={horizon}",
            f"model.context_length={context}",
        ]
        for name, settings in tables.items()
        for horizon in horizons
        for context in contexts
    }


NARROW = [
    "model.d_model=16", "model.feed_forward.d_ff_expert=32", "model.feed_forward.d_ff_shared=32",
    "model.feed_forward.router.d_router=16", "model.dropout=0.3",
    "tasks.forecast.head_dropout=0.3",
]  # fmt: skip
SHORT = "training.steps=600"
# What small tables want: models as narrow as PatchTST's on the hourly ETT tables, and fewer steps.
# Exchange rates are hardly told from a random walk: from the last value on, in small steps.
SMALL_TABLES = {
    "ETTh1": [*NARROW, SHORT],
    "ETTh2": [*NARROW, SHORT],
    "ETTm2": NARROW,
    "exchange_rate": [
        *NARROW,
        SHORT,
        "optimizer.lr=0.0001",
        "tasks.forecast.shortcut=from_last",
        "training.validate_every_steps=25",
    ],
}
# So far ahead these learn what there is within a few steps.
FAR = ["optimizer.lr=0.0003"]
# A map that learns validates better than least squares.
LEARNED = ["tasks.forecast.shortcut=from_mean"]
LTSF = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather", "exchange_rate")
M4 = {"m4_hourly_train": 48, "m4_weekly_train": 13}
SUITES = {
    "forecast": Suite(
        preset="patch_moe_forecast",
        task="forecast",
        folder="benchmarks",
        sets=_horizons(_tables("forecast", LTSF), (96, 720), (96, 336, 512)),
        figures=("mse", "mae"),
    ),
    "series": Suite(
        preset="patch_moe_univariate",
        task="forecast",
        folder="benchmarks",
        sets={
            name: [
                "tasks.forecast.type=series",
                "tasks.forecast.shortcut=from_mean",
                f"tasks.forecast.prediction_length={horizon}",
            ]
            for name, horizon in M4.items()
        },
        figures=("smape", "mase", "owa"),
    ),
    "anomaly": Suite(
        preset="patch_moe_anomaly",
        task="anomaly",
        folder="tasks/anomaly",
        sets={
            "smd_6_machines": [],
            "asd_8_servers": [],
            "smap": [],
            "msl": [],
            "nab": ["tasks.anomaly.leaves_out_labelled=true"],
            "cloud_monitoring": ["tasks.anomaly.leaves_out_labelled=true"],
        },
        figures=("auc_roc", "affiliation_f1", "vus_roc"),
    ),
    "imputation": Suite(
        preset="patch_moe_imputation",
        task="imputation",
        folder="benchmarks",
        sets=_tables("imputation", ("ETTh1", "ETTm1", "weather")),
        figures=("masked_mse",),
        settings=["tasks.imputation.mask.kinds=[points, blocks]"],
    ),
    "classification": Suite(
        preset="patch_moe_classification",
        task="classification",
        folder="tasks/classification",
        sets={
            # Long cases in longer patches.
            "ACSF1": ["model.patch_length=32"],
            "ArrowHead": ["model.patch_length=16"],
            "BasicMotions": [],
            "Epilepsy": [],
            "GunPoint": [],
            "ItalyPowerDemand": [],
            "JapaneseVowels": [],
            "OSULeaf": ["model.patch_length=16"],
            "PickupGestureWiimoteZ": ["model.patch_length=16"],
        },
        figures=("accuracy",),
    ),
}  # fmt: skip


def run_cell(
    suite: Suite, name: str, router: str, seed: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one cell, or read what an earlier start found."""
    file = args.data / suite.folder / f"{name.partition(':')[0]}.parquet"
    label = name.replace(":", "-")
    # Other settings are other runs.
    mark = hashlib.sha256(repr(args.settings).encode()).hexdigest()[:8] if args.settings else ""
    run = args.out / "-".join(filter(None, (args.task, label, router, str(seed), mark)))
    test = []
    if name in M4:
        follows = file.with_name(file.name.replace("_train", "_test"))
        test = [f"tasks.forecast.test_path={follows}"]
    words = [
        "tsmoe", "finetune", suite.preset, f"data={file}", f"run={run}", f"seed={seed}", *test,
        *suite.settings, *of_router(router, suite.sets[name]), *args.settings,
    ]  # fmt: skip
    preset = (PRESETS / f"{suite.preset}.yaml").read_bytes()
    made_by: dict[str, Any] = {
        "command": shlex.join(words),
        "preset": hashlib.sha256(preset).hexdigest(),
    }
    cell = {"set": name, "router": router, "seed": seed, "command": made_by["command"]}
    cell_file = run / "cell.json"
    if (run / "DONE").exists():
        earlier = json.loads(cell_file.read_text(encoding="utf-8")) if cell_file.exists() else {}
        if {key: earlier.get(key) for key in made_by} != made_by:
            raise SystemExit(f"{run} was made by another command or preset; use another --out")
    else:
        print(cell["command"], flush=True)
        begun = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if ended.returncode:  # such as nothing learned: the other cells can still be made
            failure = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            print(failure, flush=True)
            return {**cell, "failure": failure, "results": []}
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # there are many runs
        made_by["seconds"] = round(time.monotonic() - begun)
        cell_file.write_text(json.dumps(made_by), encoding="utf-8")
        earlier = made_by
    found = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return {
        **cell,
        "seconds": earlier["seconds"],
        "best_step": found["best_step"],
        "validation_error": min(
            e for e in found["validation_error"]["errors"].values() if e is not None
        ),
        "results": found["test"][suite.task]["results"],
    }


def main() -> None:
    """Train all cells and write what was found after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=SUITES)
    parser.add_argument("--data", type=Path, required=True, help="folder with benchmarks/, tasks/")
    parser.add_argument("--sets", help="of the task, as a,b (default: all)")
    parser.add_argument("--routers", default="recurrent", help=f"of {', '.join(ROUTERS)}")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--out", type=Path, default=Path("runs/patch_moe"), help="folder of runs")
    parser.add_argument("--name", help="of the result files (default: patch_moe_TASK)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all cells")
    args = parser.parse_intermixed_args()
    suite = SUITES[args.task]
    sets = list(suite.sets) if args.sets is None else args.sets.split(",")
    if strangers := [name for name in sets if name not in suite.sets]:
        parser.error(f"--sets: no {strangers[0]} in {args.task}; there are {', '.join(suite.sets)}")
    name = args.name or f"patch_moe_{args.task}"
    cells: list[dict[str, Any]] = []
    for set_name in sets:
        for router in args.routers.split(","):
            for seed in args.seeds.split(","):
                cells.append(run_cell(suite, set_name, router, int(seed), args))
                record(name, {"cells": cells}, notes="one process of one thread")
    path = RESULTS / f"{name}.md"
    path.write_text(markdown(suite.figures, cells), encoding="utf-8")
    if len(args.routers.split(",")) > 1 and len(args.seeds.split(",")) > 1:
        draw(suite.figures[0], cells, path.with_suffix(".png"))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
