"""Bytes that a rank exchanges in a step, by kind of collective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tsmoe.cost.layout import Layout
from tsmoe.cost.memory import rows_of
from tsmoe.cost.parameters import parameter_sizes

if TYPE_CHECKING:
    from tsmoe.models.time_tracker import TimeTrackerConfig

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Collectives of one kind and size that a rank takes part in during a step."""

    kind: str
    """all_to_all, all_reduce, reduce_scatter or all_gather."""
    what: str
    calls: int
    ranks: int
    """Members of the group."""
    stride: int
    """Between the numbers of neighbouring members: 1 where they are consecutive."""
    bytes_out: int
    """That one call sends to other ranks, from each; of reductions by the ring algorithm."""

    @property
    def total(self) -> int:
        """Bytes of all calls."""
        return self.calls * self.bytes_out


def exchanges(
    model: TimeTrackerConfig, layout: Layout, *, variates: int = 1, imbalance: float = 1.0
) -> tuple[Exchange, ...]:
    """List what a rank exchanges in a step; what is within itself only is left out.

    Args:
        model: sizes.
        layout: over ranks.
        variates: of each window.
        imbalance: rows that the fullest rank of an expert-parallel group receives, over the mean.
    """
    found = [*_row_exchanges(model, layout, variates, imbalance), *_state_exchanges(model, layout)]
    return tuple(e for e in found if e.ranks > 1 and e.bytes_out)


def _row_exchanges(
    model: TimeTrackerConfig, layout: Layout, variates: int, imbalance: float
) -> list[Exchange]:
    from tsmoe.moe.layer import MoEConfig

    if not isinstance(model.feed_forward, MoEConfig):
        return []
    size = layout.expert_parallel_size
    rows = rows_of(model, layout, variates=variates, imbalance=imbalance)
    # To and fro, forward and backward; a recomputed block sends its rows once more.
    per_layer = 6 if layout.recomputes else 4
    bytes_out = rows.received * model.d_model * layout.wire_bytes * (size - 1) // size
    passes = model.num_layers * layout.accumulation_steps
    return [
        Exchange(kind="all_to_all", what="rows of tokens", calls=per_layer * passes, ranks=size,
                 stride=1, bytes_out=bytes_out),
        Exchange(kind="all_to_all", what="counts of rows", calls=passes, ranks=size, stride=1,
                 bytes_out=model.feed_forward.num_experts * _INT64 * (size - 1) // size),
    ]  # fmt: skip


def _state_exchanges(model: TimeTrackerConfig, layout: Layout) -> list[Exchange]:
    sizes = parameter_sizes(model, expert_parallel_size=layout.expert_parallel_size)
    found = []
    for what, is_routed in (("dense", False), ("expert", True)):
        count = sum(p.numel for p in sizes if p.is_trained and p.is_routed == is_routed)
        ranks = layout.expert_data_parallel_size if is_routed else layout.world_size
        stride = layout.expert_parallel_size if is_routed else 1
        share = count * layout.numerics.weight * (ranks - 1) // ranks
        reduced, gathered = f"{what} gradients", f"{what} weights"
        # DeepSpeed 0.19.8 reduces the gradients of stages 1 and 2 by all-reduce.
        kind, times = ("reduce_scatter", 1) if layout.zero_stage == 3 else ("all_reduce", 2)
        reductions = layout.accumulation_steps if layout.zero_stage >= 2 else 1
        found.append(
            Exchange(kind=kind, what=reduced, calls=reductions, ranks=ranks, stride=stride,
                     bytes_out=times * share)
        )  # fmt: skip
        if layout.zero_stage:
            # Stage 3 gathers for the forward and for the backward pass.
            calls = 2 * layout.accumulation_steps if layout.zero_stage == 3 else 1
            found.append(
                Exchange(kind="all_gather", what=gathered, calls=calls, ranks=ranks, stride=stride,
                         bytes_out=share)
            )  # fmt: skip
    return found
