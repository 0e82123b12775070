"""Low-rank additions to linear maps, so that few weights learn (LoRA, arXiv 2106.09685).

Our own small layer and not peft: that renames parameters, needs transformers, and does not know the
joint projection to queries, keys and values, whose rows are turned in pairs.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.models.block import Block
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import MoELayer
from tsmoe.nn.query_key_value import QueryKeyValue, rows_in_pairs


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(Section):
    """Size of the additions."""

    rank: int = 8
    scale: float = 2.0
    """Multiplies the addition; LoRA calls it alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.scale <= 0:
            raise ValueError(
                f"rank ({self.rank}) must be at least 1 and scale ({self.scale}) above 0"
            )


class LowRankLinear(nn.Module):
    """A linear map that rests, plus a learned one of low rank, which starts at zero."""

    def __init__(self, base: nn.Linear, config: LowRankConfig) -> None:
        super().__init__()
        self.base = base
        self.scale = config.scale
        weight: Tensor = base.weight
        self.low_rank_down_RI = nn.Parameter(weight.new_empty(config.rank, base.in_features))
        self.low_rank_up_OR = nn.Parameter(weight.new_zeros(base.out_features, config.rank))
        nn.init.normal_(self.low_rank_down_RI, std=base.in_features**-0.5)

    def forward(self, inputs: Tensor, *, is_paired: bool = False) -> Tensor:
        """Map (..., I) to (..., O); `is_paired` is for queries, keys and values."""
        up_OR: Tensor = self.low_rank_up_OR
        if isinstance(self.base, QueryKeyValue):
            outputs = self.base(inputs, is_paired=is_paired)
            up_OR = rows_in_pairs(up_OR, self.base) if is_paired else up_OR
        else:
            outputs = self.base(inputs)
        return outputs + self.scale * F.linear(F.linear(inputs, self.low_rank_down_RI), up_OR)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Add the learned part to the map at rest, and return that."""
        self.base.weight.add_(self.low_rank_up_OR @ self.low_rank_down_RI, alpha=self.scale)
        return self.base


def insert_low_rank(model: TimeTracker, config: LowRankConfig, *, seed: int = 0) -> None:
    """Put additions beside attention's projections and the always-on networks of all layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parent, name in _places(model):
            setattr(parent, name, LowRankLinear(getattr(parent, name), config))


def merge_low_rank(model: TimeTracker) -> None:
    """Make plain linear maps of all additions; a model without any is left as it is."""
    for parent, name in _places(model):
        child = getattr(parent, name)
        if isinstance(child, LowRankLinear):
            setattr(parent, name, child.merged())


def is_low_rank(name: str) -> bool:
    """Say whether a parameter belongs to an addition."""
    return ".low_rank_" in name


def _places(model: TimeTracker) -> list[tuple[nn.Module, str]]:
    found: list[tuple[nn.Module, str]] = []
    for block in model.blocks:
        assert isinstance(block, Block)
        found += [(block.attention, "query_key_value"), (block.attention, "output")]
        layer = block.feed_forward
        network = layer.always_on if isinstance(layer, MoELayer) else layer
        if network is not None:
            found += [(network, "gate_up"), (network, "down")]
    return found
