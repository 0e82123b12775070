"""The pictures of a run's report, as PNG files' content; each is there only if its data is.

Shapes: S steps, M expert layers, E routed experts, R ranks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tsmoe.report.graph import graph_picture
from tsmoe.report.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Points of a curve; more are averaged in blocks, as the picture has no more columns.
_POINTS = 1000
# Ranks and sources that get a line or an area of their own.
_LINES = 12
_BLUE, _RED, _GREY = "#2a6f97", "#d1495b", "#9aa5ae"


def draw_all(history: RunHistory) -> dict[str, bytes]:
    """Draw what the run has data for, by file name without its ending."""
    pictures: dict[str, Callable[[RunHistory], Figure | None]] = {
        "loss": loss_picture,
        "schedule": schedule_picture,
        "throughput": throughput_picture,
        "shares": shares_picture,
        "load_over_time": load_picture,
        "layers_over_time": layers_picture,
        "exchange": exchange_picture,
        "stragglers": straggler_picture,
        "sources": sources_picture,
    }
    drawn = {name: draw(history) for name, draw in pictures.items()}
    drawn["graph"] = None if history.graph is None else graph_picture(history.graph)
    return {name: png(figure) for name, figure in drawn.items() if figure is not None}


def loss_picture(history: RunHistory) -> Figure | None:
    """Draw training and validation loss."""
    figure, (axes,) = _figure(1)
    steps, losses = thin(history.steps, history.scalars["loss/train"])
    axes.plot(steps, losses, color=_BLUE, linewidth=1, label="training")
    if history.validation:
        axes.plot(*zip(*history.validation, strict=True), "o-", color=_RED, markersize=3,
                  linewidth=1, label="validation")  # fmt: skip
    # The first steps are high above the rest; a logarithmic axis shows both.
    if losses.size and losses.min() > 0 and losses.max() > 5 * losses.min():
        axes.set_yscale("log")
    axes.set_title("loss")
    axes.legend(frameon=False)
    return figure


def schedule_picture(history: RunHistory) -> Figure | None:
    """Draw learning rate and gradient norm."""
    return _curves(history, {"optimizer/lr": "learning rate", "optimizer/grad_norm":
                             "gradient norm, before clipping"})  # fmt: skip


def throughput_picture(history: RunHistory) -> Figure | None:
    """Draw points/s, tokens/s and MFU, or FLOP/s where the peak is not known."""
    names = {"speed/points_per_second": "points/s", "speed/tokens_per_second": "tokens/s"}
    if np.isnan(history.scalars["speed/mfu"]).all():
        names["speed/flops_per_second"] = "model FLOP/s"
    else:
        names["speed/mfu"] = "MFU"
    return _curves(history, names)


def shares_picture(history: RunHistory) -> Figure | None:
    """Draw the parts of a step that were waited for others and for data."""
    names = {
        "communication_share": "waited for other ranks",
        "all_to_all_share": "of that in all-to-all",
        "speed/data_wait_share": "waited for data",
    }
    if all(np.isnan(history.scalars[name]).all() for name in names):
        return None
    figure, (axes,) = _figure(1)
    for (name, label), colour in zip(names.items(), (_RED, "#edae49", _BLUE), strict=True):
        values = history.scalars[name]
        if not np.isnan(values).all():
            axes.plot(*thin(history.steps, values), color=colour, linewidth=1, label=label)
    axes.set_ylim(0, 1)
    axes.set_title("share of the step's time")
    axes.legend(frameon=False)
    return figure


def load_picture(history: RunHistory) -> Figure | None:
    """Draw each layer's expert loads over time, as a heat map."""
    if not history.num_layers:
        return None
    load = history.tables["load"]
    mean_SM1 = np.maximum(load.tables.mean(-1, keepdims=True), 1e-9)
    relative_SME = load.tables / mean_SM1
    maps = {
        f"layer {layer}": (load.steps, relative_SME[:, layer].T)
        for layer in range(history.num_layers)
    }
    return _heat_maps(maps, rows="expert", label="load / mean load", high=2.0)


def layers_picture(history: RunHistory) -> Figure | None:
    """Draw entropy and margin of each layer over time, as heat maps."""
    wanted = {"load_entropy": "entropy of the load (1 is even)", "margin": "router margin"}
    maps = {}
    for name, title in wanted.items():
        table = history.tables.get(name)
        if table and not np.isnan(table.tables).all():
            maps[title] = (table.steps, table.tables.T)
    return _heat_maps(maps, rows="layer", label="", high=None) if maps else None


def exchange_picture(history: RunHistory) -> Figure | None:
    """Draw what each layer moved between ranks and how long that was waited for."""
    wanted = {
        "rows_moved": "tokens sent to experts of other ranks",
        "forward_seconds": "all-to-all forward, s",
        "backward_seconds": "all-to-all backward, s",
    }
    there = {n: t for n, t in wanted.items() if n in history.tables}
    if not there or not any(history.tables[name].tables.any() for name in there):
        return None
    figure, all_axes = _figure(len(there))
    for axes, (name, title) in zip(all_axes, there.items(), strict=True):
        table = history.tables[name]
        for layer, values in enumerate(table.tables.T):
            colour = _ramp(layer, len(table.tables.T))
            axes.plot(*thin(table.steps, values), linewidth=1, color=colour, label=f"layer {layer}")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    if history.num_layers <= _LINES:
        all_axes[0].legend(frameon=False, fontsize="small")
    return figure


def straggler_picture(history: RunHistory) -> Figure | None:
    """Draw the compute time of ranks: each, or the extremes where there are many."""
    table = history.tables.get("compute_seconds")
    if not table or table.tables.shape[1] < 2:
        return None
    figure, (axes,) = _figure(1)
    values_SR = table.tables
    if values_SR.shape[1] <= _LINES:
        for rank, values in enumerate(values_SR.T):
            shade = _ramp(rank, values_SR.shape[1])
            axes.plot(*thin(table.steps, values), linewidth=1, color=shade, label=f"rank {rank}")
    else:
        for quantile, label, colour in (
            (1, "slowest", _RED), (0.5, "median", _BLUE), (0, "fastest", _GREY)
        ):  # fmt: skip
            values = np.quantile(values_SR, quantile, axis=1)
            axes.plot(*thin(table.steps, values), linewidth=1, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_title("compute time of a step by rank, s")
    axes.legend(frameon=False, fontsize="small")
    return figure


def sources_picture(history: RunHistory) -> Figure | None:
    """Draw which share of the windows came from which source."""
    if not history.sources:
        return None
    totals: dict[str, float] = {}
    for _, shares in history.sources:
        for name, share in shares.items():
            totals[name] = totals.get(name, 0.0) + share
    shown = sorted(totals, key=lambda name: -totals[name])[:_LINES]
    steps = [step for step, _ in history.sources]
    rows = [[shares.get(name, 0.0) for _, shares in history.sources] for name in shown]
    if len(totals) > len(shown):
        shown.append(f"{len(totals) - _LINES} more")
        rows.append([1.0 - sum(row[at] for row in rows) for at in range(len(steps))])
    figure, (axes,) = _figure(1)
    axes.stackplot(steps, np.array(rows), colors=[_ramp(at, len(rows)) for at in range(len(rows))])
    for patch, name in zip(axes.collections, shown, strict=True):
        patch.set_label(f" {name}")  # a label that begins with _ would be left out
    axes.set_ylim(0, 1)
    axes.set_title("windows by source")
    legend = axes.legend(frameon=False, fontsize="small", loc="center left",
                         bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may hold a $
    return figure


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average long curves in blocks; steps without a value are left out."""
    is_known = ~np.isnan(values)
    steps, values = steps[is_known], values[is_known]
    block = max(1, math.ceil(len(values) / _POINTS))
    edges = np.arange(0, len(values), block)
    counts = np.diff([*edges, len(values)])
    if not len(values):
        return steps, values
    return np.add.reduceat(steps, edges) / counts, np.add.reduceat(values, edges) / counts


def _curves(history: RunHistory, names: dict[str, str]) -> Figure | None:
    """Draw curves one above the other, those that were recorded."""
    names = {n: t for n, t in names.items() if not np.isnan(history.scalars[n]).all()}
    if not names:
        return None
    figure, all_axes = _figure(len(names))
    for axes, (name, title) in zip(all_axes, names.items(), strict=True):
        axes.plot(*thin(history.steps, history.scalars[name]), color=_BLUE, linewidth=1)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    return figure


def _heat_maps(
    maps: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    rows: str,
    label: str,
    high: float | None,
) -> Figure:
    """Draw tables by title, two beside each other; `high` ends a scale that they share.

    Args:
        maps: the step of each column, and a row for each expert or layer.
        rows: what a row is.
        label: of the common scale.
        high: where it ends; None gives each its own.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = 2 if len(maps) > 1 else 1
    lines = math.ceil(len(maps) / columns)
    figure = Figure(figsize=(5.5 * columns, 2.4 * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (title, (steps, values)) in zip(all_axes, maps.items(), strict=False):
        # Cells end half way between two steps.
        between = (steps[1:] + steps[:-1]) / 2
        edges = np.concatenate(([steps[0] - 0.5], between, [steps[-1] + 0.5]))
        mesh = axes.pcolormesh(
            edges, np.arange(len(values) + 1) - 0.5, values, cmap="inferno",
            vmin=None if high is None else 0, vmax=high,
        )  # fmt: skip
        axes.set_title(title, fontsize="medium")
        axes.set_ylabel(rows)
        axes.set_xlabel("step")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.invert_yaxis()
        if high is None:
            figure.colorbar(mesh, ax=axes)
    for axes in all_axes[len(maps) :]:
        axes.set_visible(False)
    if high is not None:
        figure.colorbar(mesh, ax=list(all_axes), label=label, extend="max")
    return figure


def _figure(rows: int) -> tuple[Figure, list[Axes]]:
    # The object interface: no display is needed and no global state is left.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 0.6 + 2.2 * rows), layout="constrained")
    all_axes = list(figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0])
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[-1].set_xlabel("step")
    return figure, all_axes


def _ramp(number: int, of: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    red, green, blue, alpha = colormaps["viridis"](number / max(1, of - 1) * 0.9)
    return red, green, blue, alpha


def png(figure: Figure) -> bytes:
    """Give a figure as the content of a PNG file."""
    content = io.BytesIO()
    # The same run gives the same file.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
