"""The linear shortcut against loops over tokens, and what it must not change or see."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.instance_norm import InstanceNormConfig

CONTEXT, PATCH = 64, 8


@pytest.fixture(name="with_shortcut")
def model_with_a_learned_shortcut(make_model):
    def make(**settings: object) -> TimeTracker:
        model = make_model(linear_shortcut=True, **settings)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            weight = model.shortcut.project.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / CONTEXT**0.5)
        return model

    return make


def predict(model: TimeTracker, values_BCL: Tensor):
    with torch.no_grad():
        return model(values_BCL, ~values_BCL.isnan())


def added_by_hand(model: TimeTracker, values_BCL: Tensor, statistics) -> Tensor:
    """Go over windows, variates and tokens."""
    stride, lookahead = model.config.patch_stride, model.config.lookahead_patches
    maps_JPW = model.shortcut.project.weight.detach().unflatten(0, (lookahead, PATCH))
    loc, scale = statistics.loc_BCN1, statistics.scale_BCN1
    windows, variates, tokens, _ = loc.shape
    added = torch.empty(windows, variates, tokens, PATCH, dtype=torch.float64)
    for window in range(windows):
        for variate in range(variates):
            series_L = values_BCL[window, variate].double()
            for token in range(tokens):
                end = len(series_L) - (tokens - 1 - token) * stride
                past = series_L[max(0, end - CONTEXT) : end]
                past = (past - loc[window, variate, token]) / scale[window, variate, token]
                seen_W = torch.cat((torch.full((CONTEXT - len(past),), torch.nan), past))
                gap = 0
                while gap < CONTEXT and seen_W[CONTEXT - 1 - gap].isnan():
                    gap += 1
                map_PW = maps_JPW[min(gap // PATCH, lookahead - 1)].double()
                added[window, variate, token] = map_PW @ seen_W.nan_to_num()
    return added


@pytest.mark.parametrize("length", [64, 61, 9])
@pytest.mark.parametrize("stride", [8, 4])
@pytest.mark.parametrize("lookahead", [1, 3])
def test_it_adds_a_map_of_the_points_before_each_forecast(
    make_model, with_shortcut, walks_BCL, length: int, stride: int, lookahead: int
) -> None:
    values_BCL = 100 + torch.cat((walks_BCL, 7 * walks_BCL.flip(0)), dim=1)[..., -length:]
    values_BCL[0, 0, 3:6] = torch.nan
    values_BCL[1, 0, -17:] = torch.nan  # two patches ahead
    values_BCL[2, 1, -40:] = torch.nan  # further ahead than there are maps
    values_BCL[3] = torch.nan
    settings = {"patch_stride": stride, "lookahead_patches": lookahead}
    model, plain = with_shortcut(**settings), make_model(**settings)
    output = predict(model, values_BCL)
    added = output.prediction_BCNPK - predict(plain, values_BCL).prediction_BCNPK
    expected = added_by_hand(model, values_BCL, output.statistics)
    torch.testing.assert_close(added[..., 0].double(), expected, rtol=1e-4, atol=1e-4)
    assert expected[0].abs().max() > 0.1
    assert expected[3].abs().max() == 0


def test_a_new_one_changes_no_bit(make_model, walks_BCL) -> None:
    with_it, without = (make_model(linear_shortcut=has_one) for has_one in (True, False))
    weights = dict(without.named_parameters())
    for name, parameter in with_it.named_parameters():
        if name == "shortcut.project.weight":
            assert parameter.abs().max() == 0
        else:
            assert torch.equal(parameter, weights[name])
    found, expected = (predict(m, walks_BCL).prediction_BCNPK for m in (with_it, without))
    assert torch.equal(found, expected)


def test_it_sees_nothing_later(with_shortcut, walks_BCL) -> None:
    model = with_shortcut(lookahead_patches=2, instance_norm=InstanceNormConfig(mode="prefix"))
    other_BCL = walks_BCL.clone()
    other_BCL[..., -PATCH:] = 10 * other_BCL[..., -PATCH:].flip(0) + 3
    before, after = (predict(model, v).prediction_BCNPK for v in (walks_BCL, other_BCL))
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert (before[:, :, -1] - after[:, :, -1]).abs().max() > 0.1


@pytest.mark.parametrize("filler", [1e30, float("nan"), float("-inf")])
def test_values_under_the_mask_never_matter(with_shortcut, walks_BCL, filler: float) -> None:
    model = with_shortcut()
    observed_BCL = torch.rand(walks_BCL.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    filled_BCL = walks_BCL.masked_fill(~observed_BCL, filler)
    with torch.no_grad():
        plain, filled = (model(v, observed_BCL) for v in (walks_BCL, filled_BCL))
    assert torch.equal(plain.prediction_BCNPK, filled.prediction_BCNPK)


def test_all_quantiles_move_together(make_model, with_shortcut, walks_BCL) -> None:
    from tsmoe.heads import QuantileHeadConfig

    head = QuantileHeadConfig(levels=(0.1, 0.5, 0.9))
    found, plain = (
        predict(make(head=head), walks_BCL).prediction_BCNPK for make in (with_shortcut, make_model)
    )
    added = found - plain
    torch.testing.assert_close(added, added[..., :1].expand_as(added), rtol=1e-4, atol=1e-5)
    assert added.abs().max() > 0.1


def test_it_is_no_part_of_a_model_without(tiny_config) -> None:
    assert TimeTracker(replace(tiny_config, linear_shortcut=False)).shortcut is None
