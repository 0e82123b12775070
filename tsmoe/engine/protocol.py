"""What the training loop asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import Snapshot, StateReader
from tsmoe.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class UpdateReport:
    """What an optimizer step found."""

    grad_norm: float
    """L2 norm of the gradient of all parameters before clipping, each expert counted once; not
    finite if the update was skipped."""


class Engine(Protocol):
    """Owns model, optimizer and the exchange between ranks.

    Gradients are summed over micro-batches and *averaged* over ranks, so the loss handed to
    `backward` is this rank's share times the number of ranks. Every method is collective.
    """

    model: Any  # whichever model the run is of: its objective knows
    """The bare model, whose parameter names are the same in every engine."""
    ranks: Ranks

    def forward(self, batch: WindowBatch, *, last_micro_batch: bool) -> Any:
        """Run the model on the context of the batch's windows; `backward` must follow."""
        ...

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add the gradients of a micro-batch; exchange them with the last one."""
        ...

    def update(self, *, lr: float) -> UpdateReport:
        """Clip and step, unless the gradient is not finite; then parameters stay as they are."""
        ...

    def discard(self) -> None:
        """Forget the gradients of a step; what `update` would change stays as it is."""
        ...

    def snapshot(self) -> Snapshot:
        """Copy the training state to host memory, in full precision, split by who writes what."""
        ...

    def restore(self, reader: StateReader, *, step: int) -> None:
        """Set the training state from a checkpoint that any engine wrote after `step` steps."""
        ...
