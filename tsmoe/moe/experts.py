"""The routed experts of a layer, or this rank's share of them, as stacked weights.

Shapes: U units sent to this rank, K of its experts for each, N tokens per unit, D model width.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.moe.assignment import Assignment
from tsmoe.moe.grouped_pass import run_grouped
from tsmoe.moe.piecewise_pass import pays_for_new_shapes, run_piecewise
from tsmoe.ranks import Ranks

ExpertCompute = Literal["auto", "grouped", "loop"]

# With MKL on CPU a grouped product is faster below this many rows for an expert: 128 experts of
# 14 rows and width 32 took 12 ms piece by piece, 7 ms grouped. Above it gains 2 %, but takes
# memory for all rows at once.
_FEW_ROWS = 512


class Experts(nn.Module):
    """Gated feed-forward experts with stacked weights.

    Each expert's start is drawn from (seed, layer, global expert id), so that the same model comes
    out whatever share of the experts a rank holds. Every expert takes part in every pass, with
    zero rows too: a rank that skipped one would leave the others waiting in the gradient exchange.
    """

    def __init__(
        self,
        *,
        d_model: int,
        d_ff: int,
        num_experts: int,
        layer_index: int,
        num_layers: int,
        seed: int,
        compute: ExpertCompute = "auto",
        ranks: Ranks | None = None,
    ) -> None:
        # Not super(): an engine's subclass has a second base whose own __init__ must not run.
        nn.Module.__init__(self)
        self.ranks = ranks or Ranks()
        if num_experts % self.ranks.size:
            raise ValueError(
                f"num_experts ({num_experts}) must be a multiple of the ranks that share them "
                f"({self.ranks.size})"
            )
        self.layer_index = layer_index
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.ranks.size
        self.compute = compute
        self.gate_up_weight = nn.Parameter(torch.empty(self.num_local_experts, d_model, 2 * d_ff))
        self.down_weight = nn.Parameter(torch.empty(self.num_local_experts, d_ff, d_model))
        # The way back to the residual stream is small, so that depth does not add up its noise.
        spread = {"gate_up": d_model**-0.5, "down": (2 * num_layers * d_ff) ** -0.5}
        with torch.no_grad():
            for local_id, expert_id in enumerate(self.global_ids):
                for name, std in spread.items():
                    generator = torch.Generator().manual_seed(
                        _expert_seed(seed, layer_index, expert_id, name)
                    )
                    getattr(self, f"{name}_weight")[local_id].normal_(std=std, generator=generator)

    @property
    def global_ids(self) -> range:
        """Ids of the experts on this rank, among all of the layer."""
        first = self.ranks.rank * self.num_local_experts
        return range(first, first + self.num_local_experts)

    def forward(self, units_UND: Tensor, weights_UK: Tensor, assignment: Assignment) -> Tensor:
        """Return, for each unit, the weighted sum of the answers of its experts on this rank.

        Args:
            units_UND: what the experts of this rank are to see.
            weights_UK: contribution of each chosen expert.
            assignment: which of them takes which unit.
        """
        device_type = units_UND.device.type
        if torch.is_autocast_enabled(device_type):
            # Autocast knows neither grouped matmul nor products into given memory.
            units_UND = units_UND.to(torch.get_autocast_dtype(device_type))
        run = run_grouped if self._uses_grouped_matmul(units_UND, assignment) else run_piecewise
        return run(
            units_UND,
            weights_UK,
            self.gate_up_weight.to(units_UND.dtype),
            self.down_weight.to(units_UND.dtype),
            assignment,
        )

    def _uses_grouped_matmul(self, units_UND: Tensor, assignment: Assignment) -> bool:
        if self.compute != "auto":
            return self.compute == "grouped"
        # Rows must be multiples of 16 bytes; on CUDA only bf16 is promised by torch.
        is_aligned = all(
            size * units_UND.element_size() % 16 == 0 for size in self.down_weight.shape[1:]
        )
        num_rows = len(assignment.order_M) * units_UND.shape[1]
        if not is_aligned or num_rows == 0:
            return False
        if units_UND.is_cuda:
            return units_UND.dtype == torch.bfloat16
        # Pieces are filled up to few shapes, groups are not: 0.5 ms for each new size of a group.
        if pays_for_new_shapes(units_UND.dtype):
            return False
        return num_rows < _FEW_ROWS * self.num_local_experts


def _expert_seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
