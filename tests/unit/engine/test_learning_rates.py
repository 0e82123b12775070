"""Learning rates by part of a parameter's name."""

import pytest
import torch

from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups, set_learning_rate
from tsmoe.errors import ConfigError


def rates(model, scales: dict[str, float]) -> dict[str, float]:
    groups = parameter_groups(model, OptimizerConfig(lr_scales=scales))
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer.param_groups, 0.5)
    by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_parts_have_their_own_rate_and_the_last_that_fits_counts(make_model) -> None:
    found = rates(make_model(), {"blocks": 0.5, "experts": 0.1, "head": 10.0})
    for name, rate in found.items():
        parts = name.split(".")
        scale = 0.1 if "experts" in parts else 0.5 if "blocks" in parts else 1.0
        assert rate == pytest.approx(0.5 * (10.0 if "head" in parts else scale)), name
    assert set(found.values()) == {5.0, 0.25, 0.05, 0.5}


def test_part_is_a_whole_name_between_dots(make_model) -> None:
    with pytest.raises(ConfigError, match=r"lr_scales\.expert: .*experts"):
        rates(make_model(), {"expert": 2.0})


def test_part_that_rests_is_named(make_model) -> None:
    model = make_model()
    model.head.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"lr_scales\.head"):
        rates(model, {"head": 2.0})


def test_decay_stays_by_kind_and_resting_weights_are_in_no_group(make_model) -> None:
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("head" in name or "norm" in name)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.3, lr_scales={"head": 2.0}))
    assert {group["name"] for group in groups} == {"decayed x 2.0", "plain x 2.0", "plain"} or {
        group["name"] for group in groups
    } == {"decayed x 2.0", "plain"}
    for group in groups:
        assert all(p.requires_grad for p in group["params"])
        is_decayed = group["weight_decay"] > 0
        assert all((p.ndim >= 2) == is_decayed for p in group["params"])


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_impossible_scales_are_refused(scale) -> None:
    with pytest.raises(ValueError, match=r"lr_scales\.head"):
        OptimizerConfig(lr_scales={"head": scale})
