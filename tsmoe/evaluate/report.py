"""How evaluations and forecasts are shown: a table on the terminal, a picture in a file.

Shapes: C variates, L context steps, Q prediction steps, K quantile levels.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tsmoe.errors import ConfigError
from tsmoe.evaluate.metrics import ForecastScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table as RichTable

MAX_PANELS = 4
"""Most variates in one picture: the first ones."""


@dataclass(frozen=True, kw_only=True)
class ForecastPicture:
    """One forecast with what is known around it."""

    variates: tuple[str, ...]
    context_CL: np.ndarray
    mean_CQ: np.ndarray
    truth_CQ: np.ndarray | None = None
    quantiles_CQK: np.ndarray | None = None
    quantile_levels: tuple[float, ...] = ()
    """In increasing order."""
    times: np.ndarray | None = None
    """Timestamps of the L + Q steps; None counts steps from the start of the forecast."""


def scores_table(scores: Mapping[str, ForecastScores]) -> "RichTable":
    """Lay out one row per model and one column per error; the lowest of each column is bold."""
    from rich.table import Table as RichTable

    rows = {model: result.to_json_dict() for model, result in scores.items()}
    metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    best = {
        metric: min(row[metric] for row in rows.values() if metric in row) for metric in metrics
    }
    table = RichTable()
    # On a narrow terminal names go on in the next line, rather than end in dots.
    table.add_column("model", overflow="fold")
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right", overflow="fold")
    for model, row in rows.items():
        cells = []
        for metric in metrics:
            text = f"{row[metric]:.4f}" if metric in row else "-"
            is_best = len(rows) > 1 and row.get(metric) == best[metric]
            cells.append(f"[bold]{text}[/bold]" if is_best else text)
        table.add_row(model, *cells)
    return table


def draw_forecast(picture: ForecastPicture, path: str | Path) -> None:
    """Write a PNG with one panel per variate: context, truth, forecast and widest quantile band."""
    # The object interface with its own canvas: no display is needed and no global state is left.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(len(picture.variates), MAX_PANELS)
    figure = Figure(figsize=(10, 2.4 * shown + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(shown, 1, sharex=True, squeeze=False)[:, 0]
    for variate, axes in enumerate(panels):
        _draw_variate(axes, picture, variate)
    panels[0].legend(loc="upper left", fontsize="small", ncols=4)
    panels[-1].set_xlabel("time" if picture.times is not None else "steps from the forecast start")
    with replace_file(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=120)


def check_output(option: str, path: str, suffixes: tuple[str, ...]) -> None:
    """Refuse an output path before the work is done, not after.

    Raises:
        ConfigError: if the folder does not exist or the suffix is not one of `suffixes`.
    """
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if not target.parent.is_dir():
        raise ConfigError(f"{option} {path}: the folder {target.parent} does not exist; create it")


@contextmanager
def replace_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` and rename it at the end: no half file is left."""
    target = Path(path)
    unfinished = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield unfinished
        unfinished.replace(target)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _draw_variate(axes: "Axes", picture: ForecastPicture, variate: int) -> None:
    length, steps = picture.context_CL.shape[1], picture.mean_CQ.shape[1]
    times = picture.times if picture.times is not None else np.arange(-length, steps)
    past, future = times[:length], times[length:]
    axes.plot(past, picture.context_CL[variate], color="0.45", linewidth=1, label="context")
    if picture.truth_CQ is not None:
        axes.plot(future, picture.truth_CQ[variate], color="black", linewidth=1, label="truth")
    axes.plot(future, picture.mean_CQ[variate], color="tab:blue", linewidth=1.5, label="forecast")
    if picture.quantiles_CQK is not None and len(picture.quantile_levels) > 1:
        low, high = picture.quantile_levels[0], picture.quantile_levels[-1]
        axes.fill_between(
            future,
            picture.quantiles_CQK[variate, :, 0],
            picture.quantiles_CQK[variate, :, -1],
            color="tab:blue",
            alpha=0.2,
            linewidth=0,
            label=f"{low:g} to {high:g}",
        )
    axes.axvline(future[0], color="0.7", linewidth=0.8, linestyle="--")
    axes.set_ylabel(picture.variates[variate], parse_math=False)  # a name may hold a $
    axes.margins(x=0)
