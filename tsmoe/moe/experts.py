"""The routed experts of a layer, or this rank's share of them, as stacked weights.

Shapes: e experts on this rank, R rows sent to them, D model width, F feed-forward width.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.nn.feed_forward import gated_silu
from tsmoe.ranks import Ranks

ExpertCompute = Literal["auto", "grouped", "loop"]

# Below this many rows for an expert, one call per expert costs more than it computes (on CPU: 32
# experts of 16 rows took 9 ms forward and backward in a loop, 2 ms grouped).
_FEW_ROWS = 64


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

    def forward(self, rows_RD: Tensor, counts: list[int]) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows_RD: rows in order of expert.
            counts: rows of each local expert.
        """
        device_type = rows_RD.device.type
        if torch.is_autocast_enabled(device_type):
            # Autocast does not know grouped matmul.
            rows_RD = rows_RD.to(torch.get_autocast_dtype(device_type))
        gate_up_weight = self.gate_up_weight.to(rows_RD.dtype)
        down_weight = self.down_weight.to(rows_RD.dtype)
        if self._uses_grouped_matmul(rows_RD):
            offsets = torch.tensor(counts, device=rows_RD.device).cumsum(0).to(torch.int32)
            gate_up = F.grouped_mm(rows_RD, gate_up_weight, offs=offsets)
            return F.grouped_mm(gated_silu(gate_up), down_weight, offs=offsets)
        # unbind, not indexing: its backward stacks once, indexing adds one full tensor an expert.
        pieces = zip(
            rows_RD.split(counts), gate_up_weight.unbind(), down_weight.unbind(), strict=True
        )
        return torch.cat([_expert(piece, gate_up, down) for piece, gate_up, down in pieces])

    def _uses_grouped_matmul(self, rows_RD: Tensor) -> bool:
        if self.compute != "auto":
            return self.compute == "grouped"
        # Rows must be multiples of 16 bytes; on CUDA only bf16 is promised by torch.
        is_aligned = all(
            size * rows_RD.element_size() % 16 == 0 for size in self.down_weight.shape[1:]
        )
        if not is_aligned or len(rows_RD) == 0:
            return False
        if rows_RD.is_cuda:
            return rows_RD.dtype == torch.bfloat16
        return len(rows_RD) < _FEW_ROWS * self.num_local_experts


def _expert(rows_RD: Tensor, gate_up_DF: Tensor, down_FD: Tensor) -> Tensor:
    return gated_silu(rows_RD @ gate_up_DF) @ down_FD


def _expert_seed(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
