"""What a layer decided in a pass that will be computed again, so that it is not decided twice.

Activation checkpointing computes a block's forward pass again in the backward pass. A second
decision could differ from the first (noise, ties, scores in another order of summation), and then
the gradient would be that of no forward pass; and it would tell all ranks its counts once more.
"""

from __future__ import annotations

from tsmoe.moe.plan import DispatchPlan
from tsmoe.moe.routing import Decision, Routing


class RoutingRecord:
    """Empty in a block's first pass, which fills it; the second pass goes by it.

    It belongs to one pass of one block and holds ids and counts, no activations.
    """

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.plan: DispatchPlan | None = None

    def keep(self, routing: Routing, plan: DispatchPlan) -> None:
        """Remember the first pass."""
        self.decision, self.plan = routing.decision, plan
