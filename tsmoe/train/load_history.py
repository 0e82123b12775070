"""What the loads of past steps tell of the experts: which are dead, and pictures over time.

Shapes: E routed experts, M expert layers; S steps that are kept for the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

DEAD_AFTER_STEPS = 100
"""An expert that no decision chose in so many steps, of all ranks, is dead."""

# Steps in the picture of loads over time; where there are more, every second one goes.
_COLUMNS = 256
# Pixels of a cell.
_CELL = 8


class LoadHistory:
    """Remembers loads, step after step; those of an earlier start come from its metrics."""

    def __init__(self) -> None:
        self._last_chosen_ME: np.ndarray | None = None
        self._first_step = self._newest_step = 0
        self._kept: list[tuple[int, np.ndarray]] = []
        self._every = 1

    def add_line(self, line: Mapping[str, Any]) -> None:
        """Remember the loads of a line of metrics, if it has any."""
        if "experts" in line:
            self.add(line["step"], np.array(line["experts"]["load"]))

    def add(self, step: int, load_ME: np.ndarray) -> None:
        """Remember the loads of a step, which is later than all before."""
        if not load_ME.size:
            return
        if self._last_chosen_ME is None or self._last_chosen_ME.shape != load_ME.shape:
            self._last_chosen_ME = np.full(load_ME.shape, step - 1)
            self._first_step, self._kept = step, []
        self._last_chosen_ME[load_ME > 0] = step
        self._newest_step = step
        if step % self._every == 0:
            self._kept.append((step, load_shares(load_ME).astype(np.float32)))
        if len(self._kept) > _COLUMNS:
            self._every *= 2
            self._kept = [entry for entry in self._kept if entry[0] % self._every == 0]

    def dead_experts(self) -> list[list[int]] | None:
        """Return the dead experts' numbers by layer; None while too few steps are known."""
        if self._last_chosen_ME is None:
            return None
        if self._newest_step - self._first_step + 1 < DEAD_AFTER_STEPS:
            return None
        is_dead_ME = self._newest_step - self._last_chosen_ME >= DEAD_AFTER_STEPS
        return [np.flatnonzero(row).tolist() for row in is_dead_ME]

    def pictures(self) -> dict[str, np.ndarray]:
        """Draw heat maps of load shares, black at 0 and brightest from twice the mean on.

        Returns:
            RGB arrays by name: the newest step (a row for each layer, a column for each expert),
            and for each layer its course (a row for each expert, the newest step on the right).
        """
        if not self._kept:
            return {}
        share_SME = np.stack([share_ME for _, share_ME in self._kept])
        relative_SME = share_SME * share_SME.shape[-1]
        pictures = {"load_by_layer": heat_map(relative_SME[-1])}
        for layer in range(share_SME.shape[1]):
            pictures[f"load_over_time/layer_{layer:02}"] = heat_map(relative_SME[:, layer].T)
        return pictures


def load_shares(load_ME: np.ndarray) -> np.ndarray:
    """Divide each layer's loads by their sum; a layer without decisions has shares of 0."""
    shares: np.ndarray = load_ME / np.maximum(load_ME.sum(-1, keepdims=True), 1)
    return shares


def heat_map(relative: np.ndarray) -> np.ndarray:
    """Turn loads relative to their mean into an RGB picture: black is 0, the mean in the middle."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](np.clip(relative / 2, 0, 1))[..., :3]
    picture = np.rint(colours * 255).astype(np.uint8)
    return picture.repeat(_CELL, axis=0).repeat(_CELL, axis=1)
