"""Which expert takes which unit: choices put in order of expert.

A *unit* is what moves as a whole: a token, or all tokens of a variate where the router decides per
sequence. A *choice* is one of a unit's K experts; it is numbered `unit * K + place`.

Shapes: U units, K experts per unit, M = U*K choices, E experts, S ranks, e experts on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def count_choices(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert is chosen, int64. Not bincount: on CUDA that would wait."""
    ids_M = expert_ids.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids_M.device)
    return counts_E.scatter_add_(0, ids_M, torch.ones_like(ids_M))


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The choices of some units, in order of expert."""

    order_M: Tensor
    """int64; the choice at each place of that order."""
    counts_E: Tensor
    """int64; choices of each expert."""
    top_k: int

    @classmethod
    def of(cls, expert_ids_UK: Tensor, counts_E: Tensor) -> Assignment:
        """Sort the choices by expert; units keep their order within one."""
        return cls(
            order_M=expert_ids_UK.flatten().argsort(stable=True),
            counts_E=counts_E,
            top_k=expert_ids_UK.shape[1],
        )

    @classmethod
    def of_blocks(cls, counts_Se: Tensor, num_units: int) -> Assignment:
        """Sort units that came as one block for each rank and, in it, one for each expert.

        Args:
            counts_Se: units in each block, on the device of the units.
            num_units: their sum, known to the host: nothing here waits for the device.
        """
        counts_S, counts_eS = counts_Se.flatten(), counts_Se.T.flatten()
        start_eS = (counts_S.cumsum(0) - counts_S).unflatten(0, counts_Se.shape).T.flatten()
        shift_eS = start_eS - (counts_eS.cumsum(0) - counts_eS)
        place_U = torch.arange(num_units, device=counts_Se.device)
        order_U = place_U + shift_eS.repeat_interleave(counts_eS, output_size=num_units)
        return cls(order_M=order_U, counts_E=counts_Se.sum(0), top_k=1)

    @property
    def num_units(self) -> int:
        """Units that are assigned."""
        return len(self.order_M) // self.top_k

    @cached_property
    def units(self) -> Tensor:
        """int64 of shape M; the unit at each place of the order."""
        return self.order_M if self.top_k == 1 else self.order_M // self.top_k

    @cached_property
    def places(self) -> Tensor:
        """int64 of shape U, K; where in the order each choice of a unit stands."""
        place_M = torch.empty_like(self.order_M)
        place_M[self.order_M] = torch.arange(len(place_M), device=place_M.device)
        return place_M.unflatten(0, (-1, self.top_k))

    @cached_property
    def counts(self) -> list[int]:
        """Choices of each expert, on the host; the first look waits for the device."""
        return self.counts_E.tolist()
