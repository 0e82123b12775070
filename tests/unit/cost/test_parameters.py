import pytest
import torch
from torch import nn

from tsmoe.config import decode
from tsmoe.cost.parameters import parameter_sizes
from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups
from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.train.run_config import preset_names, read_preset
from tsmoe.train.stages import prepare_pretraining

CONFIGS = {
    name: decode(TimeTrackerConfig, read_preset(name)["model"], origin=name)
    for name in preset_names()
} | {
    "dense": TimeTrackerConfig(d_model=64, num_heads=2, feed_forward=DenseConfig(d_ff=96)),
    "shortcut": TimeTrackerConfig(
        d_model=64, num_heads=2, context_length=192, linear_shortcut=True, lookahead_patches=2
    ),
}


def build_on_meta(config: TimeTrackerConfig) -> nn.Module:
    """Shapes without memory; weights are not drawn."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor)
        model = build_model(config)
    prepare_pretraining(model)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_are_those_of_the_model(name) -> None:
    model = build_on_meta(CONFIGS[name])
    sizes = {size.name: size for size in parameter_sizes(CONFIGS[name])}
    found = dict(model.named_parameters())
    assert {name: size.numel for name, size in sizes.items()} == {
        name: parameter.numel() for name, parameter in found.items()
    }
    assert [n for n, s in sizes.items() if not s.is_trained] == [
        n for n, p in found.items() if not p.requires_grad
    ]
    decayed, plain = (
        {id(p) for p in group["params"]} for group in parameter_groups(model, OptimizerConfig())
    )
    for name, parameter in found.items():
        assert sizes[name].is_decayed == (id(parameter) in decayed)
        assert sizes[name].is_trained == (id(parameter) in decayed | plain)


def test_order_is_that_of_the_model() -> None:
    """Partitions are cut through the parameters in that order, not counting those that rest."""
    config = CONFIGS["time_tracker_tiny"]
    trained = [n for n, p in build_on_meta(config).named_parameters() if p.requires_grad]
    assert [size.name for size in parameter_sizes(config) if size.is_trained] == trained


def test_a_rank_holds_its_share_of_the_routed_experts_only() -> None:
    config = CONFIGS["time_tracker_tiny"]
    whole, shared = parameter_sizes(config), parameter_sizes(config, expert_parallel_size=4)
    for one, part in zip(whole, shared, strict=True):
        assert one.numel == part.numel * (4 if one.is_routed else 1)
