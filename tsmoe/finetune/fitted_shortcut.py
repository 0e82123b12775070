"""The linear shortcut as least squares of what a start leaves over.

Shapes: B windows, C variates, N patches, P patch length, W points that the shortcut sees, R rows
(one variate of one window), J patches ahead, S shares of the forecast, E strengths of the ridge.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tsmoe.errors import DataError
from tsmoe.evaluate.least_squares import RIDGE_GRID, NormalEquations, fitted_windows
from tsmoe.finetune.windows import TableWindows
from tsmoe.losses import target_patches
from tsmoe.models.time_tracker import TimeTracker

logger = logging.getLogger(__name__)

_MOST_ROWS = 30_000
"""Of the fit: the model has to forecast each of them."""

_FEWEST_WINDOWS = 10

_HELD_OUT = 0.2
"""Share of the windows, the last, on which the strength of the ridge is chosen."""

_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the start's forecast that may be kept beside the map."""


@dataclass(frozen=True, kw_only=True)
class FittedShortcut:
    """What a run begins with."""

    weight: Tensor
    """Of the shortcut, of shape (J P, W)."""
    share: float
    """Of the start's forecast; the rest of it is left to the map."""


@torch.no_grad()
def fit_shortcut(
    model: TimeTracker,
    windows: TableWindows,
    device: torch.device,
    *,
    windows_at_once: int = 64,
    keeps_forecast: bool = False,
) -> FittedShortcut:
    """Fit, for each patch ahead, the map from the context to what a share of the forecast misses.

    In the unit of the values, as errors are reported. Rows in which a point of the patch is not
    observed are left out. Share and strength of the ridge are chosen on the last fifth of the
    windows (the first of which overlap the others), by a fit to the others. Quantiles are kept
    whole, as their spread is no error.

    Args:
        model: whole, with a shortcut of zeros.
        windows: of the train part.
        device: to forecast on.
        windows_at_once: that the model forecasts.
        keeps_forecast: whether all of the forecast is kept, for a head that could not learn again.

    Raises:
        DataError: if there are too few rows to fit on.
    """
    model = model.to(device).eval()
    config = model.config
    assert model.shortcut is not None, "what is fitted"
    is_whole = keeps_forecast or bool(model.head.quantile_levels)
    shares = (1.0,) if is_whole else _SHARES
    logger.info("%s: fits least squares to what the start misses", windows.source)
    aheads = range(windows.geometry.last_patch + 1)
    collect = partial(_pairs, model, shares=shares, device=device, windows_at_once=windows_at_once)
    pairs = collect(windows, aheads)
    if beyond := range(len(aheads), config.lookahead_patches):
        # Not forecast here, but by who asks the package for more steps, or has a gap at the end.
        all_ahead = config.lookahead_patches * config.patch_length
        pairs += collect(windows.further(all_ahead), beyond)
    # By patch ahead, ridge and share.
    errors_JES = np.array(
        [[_errors(early, late, ridge, shares) for ridge in RIDGE_GRID] for early, late in pairs]
    )
    best = int(errors_JES[: len(aheads)].min(axis=1).sum(axis=0).argmin())
    length = config.patch_length
    weight = np.zeros((config.lookahead_patches, length, model.shortcut.num_points))
    for ahead, (early, late) in enumerate(pairs):
        ridge = RIDGE_GRID[int(errors_JES[ahead, :, best].argmin())]
        early.merge(late)
        weight[ahead] = early.solve(ridge)[:, best * length : (best + 1) * length].T
        logger.info(
            "%s: patch %d ahead begins with least squares over %d rows, ridge %g, beside %g of the "
            "start's forecast", windows.source, ahead + 1, early.rows, ridge, shares[best],
        )  # fmt: skip
    return FittedShortcut(
        weight=torch.from_numpy(weight.astype(np.float32)).flatten(0, 1), share=shares[best]
    )


def _pairs(
    model: TimeTracker,
    windows: TableWindows,
    aheads: range,
    *,
    shares: tuple[float, ...],
    device: torch.device,
    windows_at_once: int,
) -> list[tuple[NormalEquations, NormalEquations]]:
    """Sum up over the earlier and the later windows, for some patches ahead."""
    numbers = fitted_windows(windows.num_windows, windows.num_rows, max_rows=_MOST_ROWS)
    if len(numbers) < _FEWEST_WINDOWS:
        raise DataError(
            f"{windows.source}: linear_shortcut=least_squares needs {_FEWEST_WINDOWS} training "
            f"windows, there are {len(numbers)}; use more of them (table.few_shot), or "
            "linear_shortcut=learned"
        )
    split = len(numbers) - int(len(numbers) * _HELD_OUT)
    early, late = (
        _equations(model, windows, some, aheads, shares, device, windows_at_once)
        for some in (numbers[:split], numbers[split:])
    )
    pairs = list(zip(early, late, strict=True))
    if not all(early.rows and late.rows for early, late in pairs):
        raise DataError(
            f"{windows.source}: in none of the training windows, or of the last fifth of them, all "
            f"{model.config.patch_length} points of a patch to forecast are observed, so that "
            "there is nothing to fit linear_shortcut on; use linear_shortcut=learned"
        )
    return pairs


def _errors(
    early: NormalEquations, late: NormalEquations, ridge: float, shares: tuple[float, ...]
) -> np.ndarray:
    """Return the squared error on the held-out windows for each share."""
    errors_Q = late.squared_errors(early.solve(ridge))
    return errors_Q.reshape(len(shares), -1).sum(axis=1)


def _equations(
    model: TimeTracker,
    windows: TableWindows,
    numbers: np.ndarray,
    aheads: range,
    shares: tuple[float, ...],
    device: torch.device,
    windows_at_once: int,
) -> list[NormalEquations]:
    """Sum up over windows, for some patches ahead; outputs go by share, then by step."""
    config, shortcut = model.config, model.shortcut
    assert shortcut is not None
    outputs = len(shares) * config.patch_length
    found = [NormalEquations(shortcut.num_points, outputs) for _ in aheads]
    per_patch = config.patch_length // config.patch_stride
    for begin in range(0, len(numbers), windows_at_once):
        batch = windows.whole_batch(numbers[begin : begin + windows_at_once]).to(device)
        output = model(**model.arguments(batch))
        target_BCNP, is_target_BCNP = target_patches(
            batch, patch_length=config.patch_length, patch_stride=config.patch_stride
        )
        loc_BCN1, scale_BCN1 = output.statistics.loc_BCN1, output.statistics.scale_BCN1
        point_BCNP = model.head.point_forecast(output.prediction_BCNPK).float()
        context = slice(0, config.context_length)
        seen_BCNW, gap_BCN = shortcut.see(
            batch.values_BCL[..., context], batch.observed_BCL[..., context], output.statistics
        )
        last = gap_BCN.shape[2] - 1
        for ahead, equations in zip(aheads, found, strict=True):
            token = last - (windows.geometry.last_patch - ahead) * per_patch
            counts_BC = is_target_BCNP[:, :, token].all(-1) & (gap_BCN[:, :, token] == ahead)
            scale_R1 = scale_BCN1[:, :, token][counts_BC]
            target_RP = (target_BCNP[:, :, token] - loc_BCN1[:, :, token])[counts_BC]
            point_RP = point_BCNP[:, :, token][counts_BC] * scale_R1
            missed_RSP = torch.stack([target_RP - share * point_RP for share in shares], dim=1)
            equations.add(
                (seen_BCNW[:, :, token][counts_BC] * scale_R1).double().cpu().numpy(),
                missed_RSP.flatten(1).double().cpu().numpy(),
            )
    return found
