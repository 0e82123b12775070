"""What a router decides, as a value that travels with the step.

Shapes: B windows, C variates, N patches, K experts per token, E routed experts, R width of a
router's memory; 1 kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tsmoe.moe.routers.load_bias import LoadBias
    from tsmoe.nn.spans import SeriesSpans


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The part of a routing that is decided, not computed: it has no gradient."""

    expert_ids_BCNK: Tensor
    load_E: Tensor
    margin: Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts each token goes to and how much each contributes."""

    expert_ids_BCNK: Tensor
    """int64; a sequence router repeats its answer along N (expanded, not copied)."""
    weights_BCNK: Tensor
    """float32 contribution of each chosen expert."""
    scores_BCNE: Tensor
    """float32 before selection; N is 1 for a sequence router. Balance losses need them."""
    load_E: Tensor
    """int64, detached: decisions for each expert in the router's own unit (token or sequence);
    what is of no series is not counted."""
    is_per_sequence: bool
    """Whether all tokens of a variate share one decision, so that whole sequences may move.
    Of packed windows they do not: their series differ in length."""
    margin: Tensor
    """float32 scalar, detached: by how much the last chosen expert's score, load bias included,
    exceeds that of the best that was not chosen, on average over decisions; NaN without either."""
    is_token_BCN: Tensor | None = None
    """bool, of packed windows: tokens of no series reach no routed expert. None: all do."""
    router_scores_BCNE: Tensor | None = None
    """Equal to the scores, with a gradient that reaches the router and nothing before it: for
    losses that are to move the router alone. While training, by routers that score by softmax."""

    @property
    def decision(self) -> Decision:
        """What a pass that is computed again must not decide again."""
        return Decision(
            expert_ids_BCNK=self.expert_ids_BCNK, load_E=self.load_E, margin=self.margin
        )


@dataclass(frozen=True, kw_only=True)
class RouterState:
    """What the router of a layer hands to that of the next."""

    hidden_XR: Tensor | None = None
    """Memory of every token, float32; None before the first layer. X = tracks * B * C * N."""
    task_B11R: Tensor | None = None
    """What the model tells its routers of the task, in every layer; None: nothing."""


class Router(Protocol):
    """Decides which experts serve which token.

    A router may carry a state from layer to layer; those without one return None for it. Series of
    a packed window (`spans`) are routed as if each had a window of its own.
    """

    balance: LoadBias
    """Moved after each optimizer step, from loads summed over all ranks."""

    def forward(
        self,
        tokens_BCND: Tensor,
        state: RouterState | None,
        *,
        spans: SeriesSpans | None = None,
        decision: Decision | None = None,
    ) -> tuple[Routing, RouterState | None]:
        """Route normalised tokens; with a `decision`, only weigh what it chose."""
        ...
