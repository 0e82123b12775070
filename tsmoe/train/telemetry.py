"""What a step costs each rank: time computed, communicated and waited, rows moved, memory.

Nothing here communicates. A step's figures are whole only when the step has ended, so they ride on
the sum that the *next* step makes anyway; those of a run's last step are told to nobody.

Shapes: M expert layers, R ranks.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tsmoe.engine.protocol import Engine
from tsmoe.ranks import CommunicationRecord

Mark = float | torch.cuda.Event


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What a step cost, equal on every rank. Where ranks differ and none is named: their mean."""

    step_seconds: float
    """Wall time from asking for the data to the end of the update."""
    compute_seconds_R: list[float]
    """Forward and backward pass of each rank, up to the last gradient, without waits for others."""
    data_wait_seconds_R: list[float]
    memory_bytes_R: list[int]
    """Peak so far: of what torch allocated on a GPU, of the process' resident memory on CPU."""
    all_to_all_seconds: float
    """Waited for rows and their counts, forward and backward."""
    reduce_seconds: float
    """Waited for gradients after the last of them was computed, and for the step's own sums."""
    bytes_out: int
    """Sent to other ranks by all ranks in the collectives of ours; gradients are the engine's."""
    rows_moved_M: list[int]
    """Pairs of a token and a chosen expert that went to another rank, of all ranks."""
    forward_all_to_all_seconds_M: list[float]
    backward_all_to_all_seconds_M: list[float]

    @property
    def communication_share(self) -> float:
        """Part of the step that was waited for others; an exchange inside the update is not in."""
        return (self.all_to_all_seconds + self.reduce_seconds) / self.step_seconds

    @property
    def data_wait_share(self) -> float:
        """Part of the step that was waited for data."""
        return sum(self.data_wait_seconds_R) / len(self.data_wait_seconds_R) / self.step_seconds

    @property
    def straggler_spread_seconds(self) -> float:
        """Compute time of the slowest rank less that of the fastest."""
        return max(self.compute_seconds_R) - min(self.compute_seconds_R)

    @property
    def slowest_rank(self) -> int:
        """The rank that computed longest."""
        return self.compute_seconds_R.index(max(self.compute_seconds_R))


@dataclass(kw_only=True)
class _Sums:
    """One rank's figures; each is a number or one for each expert layer."""

    step_seconds: float
    compute_seconds: float
    data_wait_seconds: float
    memory_bytes: int
    all_to_all_seconds: float = 0.0
    reduce_seconds: float = 0.0
    bytes_out: int = 0
    rows_moved_M: list[int] = field(default_factory=list)
    forward_seconds_M: list[float] = field(default_factory=list)
    backward_seconds_M: list[float] = field(default_factory=list)


class StepTelemetry:
    """Measures this rank's steps, and packs and reads what travels.

    On CUDA times are events on the device's stream, read when the step's gradient norm has been
    waited for anyway.
    """

    def __init__(self, engine: Engine) -> None:
        """Watch an engine; what its ranks' `meter` counts, where there is one, is counted in."""
        self._ranks = engine.ranks
        self._num_layers = len(engine.model.routers())
        self._passes: list[tuple[Mark, Mark, Mark]] = []
        self._begun: Mark = 0.0
        self._last_gradient: Mark | None = None
        self._sums: _Sums | None = None
        # The backward pass ends here; what an engine does after it is exchange.
        first = engine.model.embed.values.weight
        if first.requires_grad:
            first.register_post_accumulate_grad_hook(self._gradient_came)

    def step_begins(self) -> None:
        """Forget what was communicated since the last step, as for validation."""
        self._passes = []
        if self._ranks.meter is not None:
            self._ranks.meter.take()

    def forward_begins(self) -> None:
        """Mark the beginning of a micro-batch."""
        self._begun, self._last_gradient = self._now(), None

    def backward_ended(self) -> None:
        """Mark the end of a micro-batch."""
        ended = self._now()
        self._passes.append((self._begun, self._last_gradient or ended, ended))

    def step_ended(self, *, seconds: float, seconds_waited: float) -> None:
        """Close the step, which took `seconds` in all and waited for data in some."""
        sums = _Sums(
            step_seconds=seconds,
            compute_seconds=sum(_between(begun, last) for begun, last, _ in self._passes),
            data_wait_seconds=seconds_waited,
            memory_bytes=peak_memory(self._ranks.device),
            reduce_seconds=sum(_between(last, ended) for _, last, ended in self._passes),
            rows_moved_M=[0] * self._num_layers,
            forward_seconds_M=[0.0] * self._num_layers,
            backward_seconds_M=[0.0] * self._num_layers,
        )
        for record in self._ranks.meter.take() if self._ranks.meter is not None else ():
            _add(sums, record)
        # Rows are waited for between the first operation and the last gradient.
        sums.compute_seconds -= sums.all_to_all_seconds
        self._sums = sums

    @property
    def width(self) -> int:
        """How many numbers travel."""
        return 5 + 3 * (self._ranks.size + self._num_layers)

    def of_step_before(self) -> list[float]:
        """Return this rank's part of the sum; zeros before the first step has ended."""
        sums, size = self._sums, self._ranks.size
        if sums is None:
            return [0.0] * self.width
        values: list[float] = [1.0, sums.step_seconds, sums.all_to_all_seconds, sums.reduce_seconds,
                               sums.bytes_out]  # fmt: skip
        for own in (sums.compute_seconds, sums.data_wait_seconds, sums.memory_bytes):
            values += [own if rank == self._ranks.rank else 0.0 for rank in range(size)]
        return values + sums.rows_moved_M + sums.forward_seconds_M + sums.backward_seconds_M

    def read(self, summed: Sequence[float]) -> StepCost | None:
        """Read the sum of all ranks' parts; None if no step was measured yet."""
        if not summed[0]:
            return None
        size, layers = self._ranks.size, self._num_layers
        step, all_to_all, reduce = (value / size for value in summed[1:4])
        rest = list(summed[5:])
        compute_R, wait_R, memory_R = (rest[i * size : (i + 1) * size] for i in range(3))
        rows_M, forward_M, backward_M = (
            rest[3 * size + i * layers : 3 * size + (i + 1) * layers] for i in range(3)
        )
        return StepCost(
            step_seconds=step,
            compute_seconds_R=compute_R,
            data_wait_seconds_R=wait_R,
            memory_bytes_R=[int(value) for value in memory_R],
            all_to_all_seconds=all_to_all,
            reduce_seconds=reduce,
            bytes_out=int(summed[4]),
            rows_moved_M=[int(value) for value in rows_M],
            forward_all_to_all_seconds_M=[value / size for value in forward_M],
            backward_all_to_all_seconds_M=[value / size for value in backward_M],
        )

    def _gradient_came(self, _: Tensor) -> None:
        self._last_gradient = self._now()

    def _now(self) -> Mark:
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    assert isinstance(end, float)
    return end - begin


def _add(sums: _Sums, record: CommunicationRecord) -> None:
    """Add what the meter counted of one kind under one label."""
    sums.bytes_out += record.bytes_out
    if record.kind == "all_reduce":
        sums.reduce_seconds += record.seconds
        return
    sums.all_to_all_seconds += record.seconds
    if record.label is None:
        return
    layer, direction = record.label
    if direction.startswith("gradient"):
        sums.backward_seconds_M[layer] += record.seconds
    else:
        sums.forward_seconds_M[layer] += record.seconds
    if direction == "to_experts":
        sums.rows_moved_M[layer] += record.rows_out


def peak_memory(device: torch.device) -> int:
    """Return the most bytes so far: that torch held on a GPU, or that the process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
