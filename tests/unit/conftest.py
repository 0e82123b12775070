"""A small model, and series to feed it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig

MakeModel = Callable[..., TimeTracker]

TINY = TimeTrackerConfig(
    patch_length=8,
    patch_stride=8,
    context_length=64,
    d_model=16,
    num_layers=2,
    num_heads=2,
    feed_forward=MoEConfig(num_experts=4, d_ff_expert=16, d_ff_shared=16),
)


@pytest.fixture
def tiny_config() -> TimeTrackerConfig:
    return TINY


@pytest.fixture
def make_model() -> MakeModel:
    """Build the tiny model with other settings, in evaluation mode."""

    def make(**settings: object) -> TimeTracker:
        return TimeTracker(replace(TINY, **settings), seed=1).eval()

    return make


@pytest.fixture(name="walks_BCL")
def random_walks() -> Tensor:
    """Five windows of one variate: random walks as long as the tiny model's context."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 1, 64, generator=generator).cumsum(-1)
