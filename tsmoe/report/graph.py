"""The graph of variates that a fine-tuned model looks along: as a file, and drawn.

Shapes: C variates.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tsmoe.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRAPH = "graph.csv"
_COLUMNS = ("variate", "looks_at", "edge_probability", "share_of_windows")
# Variates that are drawn: more could not be read.
_DRAWN = 40
# Edges of fewer windows than this share are left out of the network.
_LEAST_SHARE = 0.05
_BLUE = "#2a6f97"


@dataclass(frozen=True, kw_only=True)
class VariateLinks:
    """Which variate looks at which, over many windows."""

    variates: tuple[str, ...]
    edge_probability_CC: np.ndarray
    """Mean over windows; row i is of the variate that looks."""
    share_CC: np.ndarray
    """Share of windows in which the edge is there in evaluation."""

    def strongest(self, count: int) -> VariateLinks:
        """Keep the variates with the most edges to and from others, in their order."""
        others_CC = np.where(np.eye(len(self.variates), dtype=bool), 0, self.edge_probability_CC)
        places = np.argsort(-(others_CC.sum(0) + others_CC.sum(1)), kind="stable")[:count]
        places = np.sort(places)
        return VariateLinks(
            variates=tuple(self.variates[place] for place in places),
            edge_probability_CC=self.edge_probability_CC[np.ix_(places, places)],
            share_CC=self.share_CC[np.ix_(places, places)],
        )


def write_graph(path: Path, links: VariateLinks) -> None:
    """Write one line per pair, a variate with itself among them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row, variate in enumerate(links.variates):
        for column, neighbour in enumerate(links.variates):
            probability = links.edge_probability_CC[row, column]
            share = links.share_CC[row, column]
            writer.writerow((variate, neighbour, f"{probability:.6f}", f"{share:.6f}"))
    path.write_text(text.getvalue(), encoding="utf-8")


def read_graph(path: Path) -> VariateLinks | None:
    """Read what `write_graph` wrote; None if there is no such file.

    Raises:
        DataError: if it is no such file, or altered.
    """
    if not path.is_file():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
        variates = tuple(dict.fromkeys(line[0] for line in lines[1:]))
        numbers = np.array([[float(value) for value in line[2:]] for line in lines[1:]])
        tables_CC2 = numbers.reshape(len(variates), len(variates), 2)
        if tuple(lines[0]) != _COLUMNS:
            raise ValueError(f"its columns are {', '.join(lines[0])}")
    except (ValueError, IndexError, csv.Error) as error:
        raise DataError(
            f"{path}: is no graph as a fine-tuning run writes it ({error}); start the same "
            "`tsmoe finetune` command again, which writes it anew"
        ) from error
    return VariateLinks(
        variates=variates,
        edge_probability_CC=tables_CC2[..., 0],
        share_CC=tables_CC2[..., 1],
    )


def graph_picture(links: VariateLinks) -> Figure:
    """Draw a heat map of edge probabilities, and the network of edges with the variates' names."""
    from matplotlib.figure import Figure

    shown = links.strongest(_DRAWN)
    figure = Figure(figsize=(12.0, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_matrix(left, shown, figure)
    _draw_network(right, shown)
    if len(shown.variates) < len(links.variates):
        figure.suptitle(
            f"the {len(shown.variates)} of {len(links.variates)} variates with the most edges"
        )
    return figure


def _draw_matrix(axes: Axes, links: VariateLinks, figure: Figure) -> None:
    image = axes.imshow(links.edge_probability_CC, vmin=0, vmax=1, cmap="viridis")
    places = range(len(links.variates))
    names = [_short(name) for name in links.variates]
    size = 9 if len(names) <= 12 else 5
    axes.set_xticks(places, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(places, names, fontsize=size, parse_math=False)
    axes.set_title("edge probability (row looks at column)")
    figure.colorbar(image, ax=axes, shrink=0.8)


def _draw_network(axes: Axes, links: VariateLinks) -> None:
    count = len(links.variates)
    angles = np.pi / 2 - 2 * np.pi * np.arange(count) / count
    places_C2 = np.stack((np.cos(angles), np.sin(angles)), axis=-1)
    for row, column in np.argwhere(links.share_CC >= _LEAST_SHARE):
        if row != column:
            # From the one that is looked at to the one that looks: the way that knowledge goes.
            axes.annotate(
                "", xy=places_C2[row], xytext=places_C2[column],
                arrowprops={"arrowstyle": "-|>", "color": _BLUE, "shrinkA": 8, "shrinkB": 8,
                            "alpha": 0.15 + 0.85 * float(links.share_CC[row, column]),
                            "connectionstyle": "arc3,rad=0.08"},
            )  # fmt: skip
    axes.plot(*places_C2.T, "o", color=_BLUE, markersize=8)
    for name, (x, y) in zip(links.variates, places_C2, strict=True):
        axes.text(
            1.1 * x, 1.1 * y, _short(name), parse_math=False, va="center",
            ha="left" if x > 0.1 else "right" if x < -0.1 else "center",
            fontsize=9 if count <= 12 else 6,
        )  # fmt: skip
    axes.set_xlim(-1.6, 1.6)
    axes.set_ylim(-1.3, 1.3)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title("edges, darker where in more windows")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
