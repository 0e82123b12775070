"""The linear shortcut as least squares of what a start leaves over.

Shapes: B windows, C variates, N patches, P patch length, W points that the shortcut sees, R rows
(one variate of one window), J patches ahead, S shares of the forecast, E strengths of the ridge.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tsmoe.errors import DataError
from tsmoe.evaluate.least_squares import RIDGE_GRID, NormalEquations, fitted_windows
from tsmoe.finetune.windows import TableWindows
from tsmoe.losses import target_patches
from tsmoe.models.time_tracker import TimeTracker

logger = logging.getLogger(__name__)

_WINDOWS_AT_ONCE = 64
# The model has to forecast each of them.
_MOST_ROWS = 30_000
# The last windows, on which the strength of the ridge is chosen.
_HELD_OUT = 0.2


# Of the start's forecast that may be kept beside the map.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class FittedShortcut:
    """What a run begins with."""

    weight: Tensor
    """Of the shortcut, of shape (J P, W)."""
    share: float
    """Of the start's forecast; the rest of it is left to the map."""


@torch.no_grad()
def fit_shortcut(model: TimeTracker, windows: TableWindows, device: torch.device) -> FittedShortcut:
    """Fit, for each patch ahead, the map from the context to what a share of the forecast misses.

    In the unit of the values, as errors are reported. Rows in which a step to forecast is not
    observed are left out. Share and strength of the ridge are chosen on the last fifth of the
    windows, by a fit to the others. Quantiles are kept whole, as their spread is no error.

    Args:
        model: whole, with a shortcut of zeros.
        windows: of the train part.
        device: to forecast on.

    Raises:
        DataError: if there is no row to fit on.
    """
    model = model.to(device).eval()
    assert model.shortcut is not None, "what is fitted"
    shares = (1.0,) if model.head.quantile_levels else _SHARES
    numbers = fitted_windows(windows.num_windows, windows.num_rows, max_rows=_MOST_ROWS)
    held_out = len(numbers) - max(1, int(len(numbers) * _HELD_OUT))
    parts = [
        _equations(model, windows, some, shares, device)
        for some in (numbers[:held_out], numbers[held_out:])
    ]
    pairs = list(zip(*parts, strict=True))
    if not all(early.rows and late.rows for early, late in pairs):
        raise DataError(
            f"{windows.source}: in too few training windows all steps of a patch to forecast are "
            "observed, so that there is nothing to fit linear_shortcut on; use "
            "linear_shortcut=learned"
        )
    # By patch ahead, ridge and share.
    errors_JES = np.array(
        [[_errors(early, late, ridge, shares) for ridge in RIDGE_GRID] for early, late in pairs]
    )
    best = int(errors_JES.min(axis=1).sum(axis=0).argmin())
    length = model.config.patch_length
    weight = np.zeros((model.config.lookahead_patches, length, model.shortcut.num_points))
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
    shares: tuple[float, ...],
    device: torch.device,
) -> list[NormalEquations]:
    """Sum up over windows, for each patch that is forecast; outputs go by share, then by step."""
    config, shortcut = model.config, model.shortcut
    assert shortcut is not None
    patches = windows.geometry.last_patch + 1
    outputs = len(shares) * config.patch_length
    found = [NormalEquations(shortcut.num_points, outputs) for _ in range(patches)]
    per_patch = config.patch_length // config.patch_stride
    for begin in range(0, len(numbers), _WINDOWS_AT_ONCE):
        batch = windows.batch_of(numbers[begin : begin + _WINDOWS_AT_ONCE]).to(device)
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
        for ahead, equations in enumerate(found):
            token = last - (patches - 1 - ahead) * per_patch
            # What of the last patch lies behind the steps to forecast is left as it is.
            wanted = windows.geometry.prediction_length - ahead * config.patch_length
            counts_BC = is_target_BCNP[:, :, token, :wanted].all(-1)
            counts_BC &= gap_BCN[:, :, token] == ahead
            scale_R1 = scale_BCN1[:, :, token][counts_BC]
            target_RP = (target_BCNP - loc_BCN1)[:, :, token][counts_BC]
            point_RP = point_BCNP[:, :, token][counts_BC] * scale_R1
            missed = [target_RP - share * point_RP for share in shares]
            missed_RSP = torch.stack(missed, dim=1)
            missed_RSP[..., wanted:] = 0
            equations.add(
                (seen_BCNW[:, :, token][counts_BC] * scale_R1).double().cpu().numpy(),
                missed_RSP.flatten(1).double().cpu().numpy(),
            )
    return found
