"""Forecasts of a few held-out windows while a run goes on, as one small picture.

They come out of the validation pass that all ranks make anyway, so showing them takes no further
pass and no communication: the first rank looks at its own first windows, the same each time.

Shapes: B windows, C variates, L points of a context, Q points that follow, W = L + Q, N patches,
K values per point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tsmoe.batch import WindowBatch
from tsmoe.models.output import ModelOutput, TaskOutput
from tsmoe.nn.spans import NO_SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOWS_SHOWN = 6
# Points of the context that are shown, in lengths of the forecast.
_CONTEXT_SHOWN = 4
_BLUE, _ORANGE = "#2a6f97", "#e07a1f"


@dataclass(frozen=True, kw_only=True)
class HeldOutForecast:
    """One window that nothing was learned from: what came before, what followed, what was said."""

    name: str
    context_L: np.ndarray
    """The last points before; NaN where not observed."""
    target_Q: np.ndarray
    forecast_Q: np.ndarray
    band_2Q: np.ndarray | None = None
    """Lowest and highest quantile, of models that have some."""


class HeldOutForecasts:
    """Takes windows out of a validation pass, from its first block that has any to show."""

    def __init__(self, series_name: Callable[[int], str]) -> None:
        """Name windows by the number of their series."""
        self._series_name = series_name
        self.found: list[HeldOutForecast] = []

    def see(
        self,
        model: Any,
        batch: WindowBatch,
        output: Any,
        *,
        series_name: Callable[[int], str] | None = None,
    ) -> None:
        """Look at what a model made of a batch; not collective.

        Args:
            model: that made it.
            batch: held-out windows, their context at the beginning.
            output: of the model.
            series_name: where this batch's series have names of their own.
        """
        if self.found or batch.labels_B is not None:
            return
        values_BCW = torch.where(batch.observed_BCL | batch.is_target_BCL, batch.values_BCL, np.nan)
        if isinstance(output, ModelOutput):
            values_BCW = _of_last_series(values_BCW, model, batch)
            forecast_BCQK = _after_last_token(output)
            levels = getattr(model.head, "quantile_levels", ())
        elif isinstance(output, TaskOutput):
            forecast_BCQK, levels = output.prediction[..., None], ()
        steps = forecast_BCQK.shape[2]
        if steps == values_BCW.shape[-1]:
            return  # points were filled in, not forecast
        known_BCW = values_BCW.float().cpu().numpy()
        self.add(
            known_BCW[..., :-steps],
            known_BCW[..., -steps:],
            forecast_BCQK.float().cpu().numpy(),
            levels=levels,
            names_B=[(series_name or self._series_name)(i) for i in batch.series_ids_B.tolist()],
        )

    def add(
        self,
        context_BCL: np.ndarray,
        target_BCQ: np.ndarray,
        forecast_BCQK: np.ndarray,
        *,
        levels: tuple[float, ...] = (),
        names_B: list[str] | None = None,
    ) -> None:
        """Choose windows of a block, evenly apart, and one variate of each; not collective.

        Args:
            context_BCL: NaN where not observed.
            target_BCQ: what followed; windows without any are passed over.
            forecast_BCQK: one value a point, or its quantiles.
            levels: of the quantiles.
            names_B: of the windows; by default a window has the name of its variate.
        """
        has_target_BC = np.isfinite(target_BCQ).any(-1)
        windows = np.flatnonzero(has_target_BC.any(-1))
        if self.found or not len(windows):
            return
        places = np.linspace(0, len(windows) - 1, min(WINDOWS_SHOWN, len(windows))).astype(int)
        shown = _CONTEXT_SHOWN * target_BCQ.shape[-1]
        middle = levels.index(0.5) if levels else 0
        for number, window in enumerate(windows[places]):
            variates = np.flatnonzero(has_target_BC[window])
            variate = int(variates[number % len(variates)])
            forecast_QK = forecast_BCQK[window, variate]
            name = self._series_name(variate) if names_B is None else names_B[window]
            self.found.append(
                HeldOutForecast(
                    name=name,
                    context_L=context_BCL[window, variate, -shown:],
                    target_Q=target_BCQ[window, variate],
                    forecast_Q=forecast_QK[:, middle],
                    band_2Q=np.sort(forecast_QK, -1)[:, [0, -1]].T if levels else None,
                )
            )


def _after_last_token(output: ModelOutput) -> torch.Tensor:
    """Return what the last token predicts, in the unit of the values: forecast_BCQK."""
    scale_BC11 = output.statistics.scale_BCN1[:, :, -1, :, None]
    loc_BC11 = output.statistics.loc_BCN1[:, :, -1, :, None]
    return output.prediction_BCNPK[:, :, -1].float() * scale_BC11 + loc_BC11


def _of_last_series(values_BCW: torch.Tensor, model: Any, batch: WindowBatch) -> torch.Tensor:
    """Hide, in packed windows, what is not of the series that the last token is of."""
    if batch.series_BCN is None:
        return values_BCW
    last_BC1 = batch.series_BCN[..., -1:]
    is_same_BCN = (batch.series_BCN == last_BC1) & (last_BC1 != NO_SERIES)
    # Packed windows are cut into patches without rest, and series begin with a patch.
    is_shown_BCW = is_same_BCN.repeat_interleave(model.config.patch_stride, dim=-1)
    missing = values_BCW.shape[-1] - is_shown_BCW.shape[-1]
    rest_BCW = is_same_BCN[..., -1:].expand(*is_same_BCN.shape[:2], missing)
    return torch.where(torch.cat((is_shown_BCW, rest_BCW), dim=-1), values_BCW, np.nan)


def draw_forecasts(forecasts: Sequence[HeldOutForecast]) -> np.ndarray:
    """Draw a small picture of all, as RGB: the past grey, the truth blue, the forecast orange."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(forecasts) // 2)
    figure = Figure(figsize=(7.2, 1.35 * rows), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.17 / rows, bottom=0.01, hspace=0.16,
                           wspace=0.02)  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    for place, forecast in enumerate(forecasts):
        axes = figure.add_subplot(rows, 2, place + 1)
        _draw(axes, forecast)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw(axes: Axes, forecast: HeldOutForecast) -> None:
    past = len(forecast.context_L)
    before = np.arange(-past, 0)
    after = np.arange(len(forecast.target_Q))
    axes.plot(before, forecast.context_L, color="0.55", linewidth=1)
    if forecast.band_2Q is not None:
        axes.fill_between(after, *forecast.band_2Q, color=_ORANGE, alpha=0.25, linewidth=0)
    axes.plot(after, forecast.target_Q, color=_BLUE, linewidth=1.2)
    axes.plot(after, forecast.forecast_Q, color=_ORANGE, linewidth=1.2)
    axes.axvline(-0.5, color="0.8", linewidth=0.8)
    axes.margins(x=0.01)
    axes.set_xticks([])
    axes.set_yticks([])
    name = forecast.name if len(forecast.name) <= 48 else f"…{forecast.name[-47:]}"
    axes.set_title(name, fontsize=7, pad=2, loc="left", parse_math=False)
