"""The pictures of the curation report, as text that a page can hold.

Charts are SVG images in data URLs, so that the page needs nothing beside it and the names inside of
one do not meet those of another.
"""

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.curation.summary import Count, Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS = 20
"""Domains in the chart; the rest is one bar."""

KEPT_COLOUR = "#2a6f97"
DROPPED_COLOUR = "#d1495b"

_WIDTH, _HEIGHT = 220.0, 56.0


def histogram_chart(histogram: Histogram, label: str, *, is_logarithmic: bool = False) -> str:
    """Draw kept series as an area and dropped ones as a line over it, as a data URL.

    Counts are on a logarithmic axis: a few dropped among many kept are what one looks for.
    """
    figure, axes = _figure()
    edges = histogram.edges
    axes.stairs(histogram.kept, edges, fill=True, color=KEPT_COLOUR, label="kept")
    axes.stairs(histogram.dropped, edges, color=DROPPED_COLOUR, linewidth=1.5, label="dropped")
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(bottom=0.7)
    filled = np.flatnonzero(histogram.kept + histogram.dropped)
    if filled.size:
        axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
    if is_logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("series")
    axes.legend(frameon=False, fontsize="small")
    return _data_url(figure)


def domain_chart(domains: Mapping[str, Count]) -> str:
    """Draw the points of the kept series by domain, the largest on top, as a data URL."""
    shown = list(domains.items())[:MAX_BARS]
    rest = sum(count.points for count in list(domains.values())[MAX_BARS:])
    names = [name for name, _ in shown]
    points = [count.points for _, count in shown]
    if rest:
        names.append(f"{len(domains) - MAX_BARS} more")
        points.append(rest)
    figure, axes = _figure(height=1.0 + 0.25 * len(names))
    axes.barh(np.arange(len(names)), points, color=KEPT_COLOUR)
    # Not mathtext: a name may hold a $.
    axes.set_yticks(np.arange(len(names)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("points kept")
    return _data_url(figure)


def course_drawing(values: np.ndarray, colour: str) -> str:
    """Draw the course of a series as an SVG element; gaps stay open, infinities count as such."""
    values = np.where(np.isinf(values), np.nan, values.astype(np.float64))
    seen = values[~np.isnan(values)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    x = np.linspace(2.0, _WIDTH - 2.0, len(values))
    share = (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 0.5)
    y = 2.0 + (1.0 - share) * (_HEIGHT - 4.0)
    lines = []
    for part in np.split(np.arange(len(values)), np.flatnonzero(np.diff(np.isnan(values))) + 1):
        if part.size and not np.isnan(values[part[0]]):
            points = " ".join(f"{x[i]:.1f},{y[i]:.1f}" for i in part)
            end = f" {x[part[0]] + 1:.1f},{y[part[0]]:.1f}" if part.size == 1 else ""
            lines.append(f'<polyline points="{points}{end}"/>')
    return (
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" fill="none" stroke="{colour}">'
        f"{''.join(lines)}</svg>"
    )


def _figure(height: float = 2.6) -> "tuple[Figure, Axes]":
    # The object interface with its own canvas: no display is needed and no global state is left.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _data_url(figure: "Figure") -> str:
    import matplotlib

    content = io.BytesIO()
    # The same table gives the same page: no date, and no random names.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curation"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
