"""What the loader hands to the model: a batch of windows with their masks.

Shapes: B windows, C variates, L points of a window, N patches of its context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows cut from series, C = 1 where variates are treated one by one."""

    values_BCL: Tensor
    """float32; 0 where not observed."""
    observed_BCL: Tensor
    """bool; True where the model may see a recorded value."""
    is_target_BCL: Tensor
    """bool; True where the loss may look: recorded, and inside the split that is being used."""
    series_ids_B: Tensor
    """int64; the number of each window's series in the corpus, to name it in an error; of a packed
    window that of its first."""
    series_BCN: Tensor | None = None
    """int64; where windows hold several series, the number in the corpus of the series that each
    patch of the context is a token of, -1 for none: fill, or only the target of the patch before
    it. None: a window holds one series."""

    is_covariate_BC: Tensor | None = None
    """bool; True for variates that help to forecast others and are not forecast. None: none."""
    labels_B: Tensor | None = None
    """int64; the class of each window, where windows are to be told apart."""
    task: str | None = None
    """Which of a model's tasks the windows are for; None: it has one."""

    @property
    def num_windows(self) -> int:
        """Windows in the batch."""
        return self.values_BCL.shape[0]

    def to(self, device: torch.device) -> WindowBatch:
        """Copy to a device; asynchronous from pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> WindowBatch:
        """Copy to page-locked memory (the hook that torch's DataLoader calls)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> WindowBatch:
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)
