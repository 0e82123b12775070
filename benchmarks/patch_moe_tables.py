"""Tables and pictures of what `patch_moe.py` finds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

HIGHER_IS_BETTER = ("accuracy", "auc_roc")

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


def markdown(figures: tuple[str, ...], cells: list[dict[str, Any]]) -> str:
    """Lay out a line for each set and setting, a column for each router and baseline."""
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for cell in with_best_look_back(cells):
        for result in cell["results"]:
            line = rows.setdefault(_name_line(cell, result), {})
            model = f"{cell['router']} router" if result["model"] == "tsmoe" else result["model"]
            is_start = result["model"] == "tsmoe" and cell.get("best_step") == 0
            line.setdefault(model, []).append({**result, "is_start": is_start})
    models = list(dict.fromkeys(model for line in rows.values() for model in line))
    others = list(dict.fromkeys(
        other for name in rows for other in PUBLISHED.get(name.partition(" ")[0], {})
    ))  # fmt: skip
    titles = [*models, *(f"{other} (published)" for other in others)]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    for name, line in rows.items():
        texts = [_text(figures, line[model]) if model in line else "" for model in models]
        texts += [PUBLISHED.get(name.partition(" ")[0], {}).get(other, "") for other in others]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    lines += ["", f"{', '.join(figures)} on the test part; ± deviation over seeds."]
    if any("*" in line for line in lines):
        lines[-1] += " * nothing learned validated better than the shortcut it began with."
    return "\n".join(lines) + "\n"


def draw(measure: str, cells: list[dict[str, Any]], path: Path) -> None:
    """Draw a figure of each router, a point for a seed, from the mean of the first one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


def _text(figures: tuple[str, ...], results: list[dict[str, Any]]) -> str:
    texts = []
    for figure in figures:
        values = [result[figure] for result in results if result.get(figure) is not None]
        if not values:
            texts.append("-")
            continue
        spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
        texts.append(f"{statistics.mean(values):.4f}{spread}")
    mark = " *" if any(result["is_start"] for result in results) else ""
    return " / ".join(texts) + mark
