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
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

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
LTSF = ("ETTh1", "ETTh2", "ETTm1", "ETTm2", "weather", "exchange_rate")
HIGHER_IS_BETTER = ("accuracy", "auc_roc")
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


# Errors of other models as METHODS quotes them from DUET's paper (look-back searched), MSE / MAE,
# and of CATCH from its own, AUC-ROC / affiliation F1.
PUBLISHED: dict[str, dict[str, str]] = {
    "ETTh1:96": {"DUET": ".352/.384", "PatchTST": ".377/.397", "TimeMixer": ".372/.401",
                 "DLinear": ".379/.403"},
    "ETTh1:720": {"DUET": ".429/.455", "PatchTST": ".457/.477", "TimeMixer": ".486/.484",
                  "DLinear": ".471/.493"},
    "ETTh2:96": {"DUET": ".270/.336", "PatchTST": ".274/.337", "TimeMixer": ".281/.351",
                 "DLinear": ".300/.364"},
    "ETTh2:720": {"DUET": ".382/.425", "PatchTST": ".406/.441", "TimeMixer": ".401/.436",
                  "DLinear": ".704/.597"},
    "ETTm1:96": {"DUET": ".279/.333", "PatchTST": ".289/.343", "TimeMixer": ".293/.345",
                 "DLinear": ".300/.345"},
    "ETTm1:720": {"DUET": ".405/.408", "PatchTST": ".416/.423", "TimeMixer": ".426/.417",
                  "DLinear": ".419/.416"},
    "ETTm2:96": {"DUET": ".161/.248", "PatchTST": ".165/.255", "TimeMixer": ".165/.256",
                 "DLinear": ".164/.255"},
    "ETTm2:720": {"DUET": ".348/.374", "PatchTST": ".362/.381", "TimeMixer": ".360/.387",
                  "DLinear": ".371/.401"},
    "weather:96": {"DUET": ".146/.191", "PatchTST": ".149/.196", "TimeMixer": ".147/.198",
                   "DLinear": ".170/.230"},
    "weather:720": {"DUET": ".305/.319", "PatchTST": ".312/.330", "TimeMixer": ".318/.330",
                    "DLinear": ".323/.362"},
    "exchange_rate:96": {"DUET": ".080/.198", "PatchTST": ".079/.200", "TimeMixer": ".084/.207",
                         "DLinear": ".080/.202"},
    "exchange_rate:720": {"DUET": ".583/.580", "PatchTST": ".751/.650", "TimeMixer": ".884/.707",
                          "DLinear": ".578/.605"},
    "smap": {"CATCH": ".504/.699"},
    "msl": {"CATCH": ".664/.740"},
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


def markdown(suite: Suite, cells: list[dict[str, Any]]) -> str:
    """Lay out a line for each set and setting, a column for each router and baseline."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in with_best_look_back(cells):
        for result in cell["results"]:
            line = rows.setdefault(_name_line(cell, result), {})
            model = f"{cell['router']} router" if result["model"] == "tsmoe" else result["model"]
            line.setdefault(model, []).append(result)
    models = list(dict.fromkeys(model for line in rows.values() for model in line))
    others = list(dict.fromkeys(
        other for name in rows for other in PUBLISHED.get(name.partition(" ")[0], {})
    ))  # fmt: skip
    titles = [*models, *(f"{other} (published)" for other in others)]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, line in rows.items():
        texts = [_text(suite, line[model]) if model in line else "" for model in models]
        texts += [PUBLISHED.get(name.partition(" ")[0], {}).get(other, "") for other in others]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", f"{', '.join(suite.figures)} on the test part; ± deviation over seeds."]
    return "\n".join(lines) + "\n"


def draw(suite: Suite, cells: list[dict[str, Any]], path: Path) -> None:
    """Draw the first figure of each router, a point for a seed, from the mean of the first one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = suite.figures[0]
    lines: dict[str, dict[str, list[float]]] = {}
    for cell in with_best_look_back(cells):
        for result in cell["results"]:
            if result["model"] == "tsmoe" and result.get(measure) is not None:
                line = lines.setdefault(_name_line(cell, result), {})
                line.setdefault(cell["router"], []).append(result[measure])
    routers = list(dict.fromkeys(cell["router"] for cell in cells))
    picture = Figure(figsize=(7.6, 1.2 + 0.3 * len(lines)), layout="constrained")
    FigureCanvasAgg(picture)
    axes = picture.subplots()
    for place, router in enumerate(routers):
        offset = 0.6 * (place + 0.5) / len(routers) - 0.3
        points = [
            (100 * (value / statistics.mean(line[routers[0]]) - 1), row + offset)
            for row, line in enumerate(lines.values())
            if routers[0] in line
            for value in line.get(router, [])
        ]
        axes.plot(*np.reshape(points, (-1, 2)).T, "o", ms=5, alpha=0.6, label=router)
    axes.axvline(0, color="0.7", lw=0.8, zorder=0)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.invert_yaxis()
    better = "higher" if measure in HIGHER_IS_BETTER else "lower"
    axes.set_xlabel(f"{measure}, % from the mean of {routers[0]} ({better} is better)")
    picture.legend(loc="outside right upper", fontsize=8)
    picture.savefig(path, dpi=110, metadata={"Software": None})


def _name_line(cell: dict[str, Any], result: dict[str, Any]) -> str:
    where = " ".join(str(result[key]) for key in ("mask", "share") if key in result)
    return f"{cell['set']} {where}".strip()


def with_best_look_back(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep, of each forecast with each router and seed, the look-back that validates best."""
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in cells:
        name, *lengths = cell["set"].split(":")
        key = (name, *lengths[:1], cell["router"], cell["seed"])
        if "failure" in cell:
            continue
        if key not in best or cell["validation_error"] < best[key]["validation_error"]:
            kept = ":".join([name, *lengths[:1]])
            best[key] = {**cell, "set": kept}
    return list(best.values())


def _text(suite: Suite, results: list[dict[str, Any]]) -> str:
    texts = []
    for figure in suite.figures:
        values = [result[figure] for result in results if result.get(figure) is not None]
        if not values:
            texts.append("-")
            continue
        spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
        texts.append(f"{statistics.mean(values):.4f}{spread}")
    return " / ".join(texts)


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
    path.write_text(markdown(suite, cells), encoding="utf-8")
    if len(args.routers.split(",")) > 1 and len(args.seeds.split(",")) > 1:
        draw(suite, cells, path.with_suffix(".png"))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
