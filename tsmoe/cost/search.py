"""Look for layouts that fit, and for the fastest of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tsmoe.cost.layout import Layout
from tsmoe.cost.machine import Machine
from tsmoe.cost.memory import MemoryPlan, plan_memory
from tsmoe.cost.step_time import StepTime, predict_step

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig

# Predictions nearer than this are equal: the simpler layout is suggested then.
_EQUAL = 0.02


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, whatever the layout."""

    model: TimeTrackerConfig
    machine: Machine
    global_batch_size: int
    variates: int = 1
    imbalance: float = 1.0

    def memory(self, layout: Layout) -> MemoryPlan:
        """Predict the peak of a rank."""
        return plan_memory(self.model, layout, variates=self.variates, imbalance=self.imbalance)

    def step(self, layout: Layout) -> StepTime:
        """Predict the time of a step."""
        return predict_step(
            self.model, layout, self.machine, variates=self.variates, imbalance=self.imbalance
        )

    def fits(self, layout: Layout) -> bool:
        """Whether a rank's tensors find room."""
        return self.needed(self.memory(layout)) <= self.machine.memory.value

    def needed(self, memory: MemoryPlan) -> int:
        """Bytes of a rank's share of memory; what a processor offloads stays where it is."""
        return memory.total + (0 if self.machine.is_gpu else memory.host)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that fits, and what is predicted of it."""

    layout: Layout
    memory: MemoryPlan
    step: StepTime


def largest_micro_batch(job: Job, layout: Layout) -> int:
    """Return the most windows of a pass that fit, whatever the global batch; 0 if not even one."""

    def fits(windows: int) -> bool:
        return job.fits(replace(layout, micro_batch_size=windows))

    if not fits(1):
        return 0
    below, above = 1, 2
    while fits(above):
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below


def suggest(job: Job, layout: Layout, *, count: int = 3) -> list[Candidate]:
    """Return the fastest layouts that fit, for the same ranks, precision and global batch.

    Of layouts that are predicted equally fast the simplest comes first: no offload, nothing
    recomputed, a lower stage, experts over fewer ranks, larger micro-batches.
    """
    found = []
    for option in _options(job, layout):
        memory = job.memory(option)
        if job.needed(memory) <= job.machine.memory.value:
            found.append(Candidate(layout=option, memory=memory, step=job.step(option)))
    if not found:
        return []
    fastest = min(candidate.step.total for candidate in found)

    def order(candidate: Candidate) -> tuple[float, ...]:
        chosen = candidate.layout
        slower = math.floor(math.log(candidate.step.total / fastest) / math.log1p(_EQUAL))
        return (slower, chosen.offloads_optimizer, chosen.recomputes, chosen.zero_stage,
                chosen.expert_parallel_size, -chosen.micro_batch_size)  # fmt: skip

    # One of each kind: the same layout with other micro-batches tells nothing new.
    kinds: dict[tuple[object, ...], Candidate] = {}
    for candidate in sorted(found, key=order):
        chosen = candidate.layout
        kind = (chosen.expert_parallel_size, chosen.zero_stage, chosen.recomputes,
                chosen.offloads_optimizer)  # fmt: skip
        kinds.setdefault(kind, candidate)
    return list(kinds.values())[:count]


def _options(job: Job, layout: Layout) -> Iterator[Layout]:
    from tsmoe.moe.layer import MoEConfig

    feed_forward = job.model.feed_forward
    experts = feed_forward.num_experts if isinstance(feed_forward, MoEConfig) else 1
    shared = math.gcd(layout.world_size, experts)
    sizes = [size for size in range(1, shared + 1) if shared % size == 0]
    per_rank = job.global_batch_size // layout.world_size
    batches = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    stages = (1, 2, 3)
    for size, stage, batch in itertools.product(sizes, stages, batches):
        for recomputes, offloads in itertools.product((False, True), repeat=2):
            yield replace(
                layout,
                expert_parallel_size=size,
                zero_stage=stage,  # type: ignore[arg-type]
                micro_batch_size=batch,
                accumulation_steps=per_rank // batch,
                recomputes=recomputes,
                offloads_optimizer=offloads,
            )
