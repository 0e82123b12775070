from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tsmoe.heads import QuantileHeadConfig
from tsmoe.models.block import DenseConfig
from tsmoe.models.output import ModelOutput
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.instance_norm import InstanceNormConfig

MODES = ("prefix", "token", "sequence")


def settings_of(router: str, norm: str) -> dict:
    """Settings by the router's mode, "dense" for no router, and the mode of the instance norm."""
    feed_forward = DenseConfig(d_ff=16)
    if router != "dense":
        feed_forward = MoEConfig(
            num_experts=4, d_ff_expert=16, d_ff_shared=16, router=SequenceRouterConfig(mode=router)
        )
    return {"feed_forward": feed_forward, "instance_norm": InstanceNormConfig(mode=norm)}


def run(model: TimeTracker, values_BCL: Tensor, *arguments: Tensor) -> ModelOutput:
    """Run on values of which all but NaN are observed."""
    with torch.no_grad():
        return model(values_BCL, ~values_BCL.isnan(), *arguments)


def forecasts(output: ModelOutput) -> Tensor:
    """Predictions of every token in the unit of the values."""
    statistics = output.statistics
    return output.prediction_BCNPK[..., 0] * statistics.scale_BCN1 + statistics.loc_BCN1


def change_of_earlier_tokens(model: TimeTracker, before_BCL: Tensor, after_BCL: Tensor) -> float:
    change = forecasts(run(model, before_BCL)) - forecasts(run(model, after_BCL))
    assert change[:, :, -1].abs().max() > 0.1, "the last token does see the change"
    return change[:, :, :-1].abs().max().item()


@pytest.fixture
def walks_with_another_end(walks_BCL: Tensor) -> Tensor:
    other_BCL = walks_BCL.clone()
    other_BCL[..., -8:] = 10 * other_BCL[..., -8:].flip(0) + 3
    return other_BCL


@pytest.mark.parametrize("router", ["prefix", "token", "dense"])
@pytest.mark.parametrize("stride", [8, 4])
def test_last_patch_changes_no_earlier_output(
    make_model, walks_BCL, walks_with_another_end, router: str, stride: int
) -> None:
    model = make_model(patch_stride=stride, **settings_of(router, "prefix"))
    if stride == 4:  # the last two tokens see the last eight points
        walks_with_another_end[..., -8:-4] = walks_BCL[..., -8:-4]
    assert change_of_earlier_tokens(model, walks_BCL, walks_with_another_end) == 0


@pytest.mark.parametrize(
    ("router", "norm"), [("sequence", "prefix"), ("prefix", "window"), ("dense", "window")]
)
def test_the_papers_modes_do_look_ahead(
    make_model, walks_BCL, walks_with_another_end, router: str, norm: str
) -> None:
    model = make_model(**settings_of(router, norm))
    assert change_of_earlier_tokens(model, walks_BCL, walks_with_another_end) > 0.1


def test_first_observation_in_the_last_patch_is_unknown_before(make_model, walks_BCL) -> None:
    walks_BCL[..., :-8] = torch.nan
    earlier = forecasts(run(make_model(), walks_BCL))[:, :, :-1]
    assert earlier.abs().max() < 1e-9, "a forecast of 0 until something is observed"


# Values of 5e4 are resolved to 4e-3 in float32, 1e-6 of a spread of some thousands; two layers
# multiply that by less than 100.
@pytest.mark.parametrize(("factor", "offset"), [(1000.0, 5e4), (1e-9, 0.0), (1e9, -3e9)])
@pytest.mark.parametrize("norm", ["prefix", "window"])
def test_forecast_follows_the_unit(make_model, walks_BCL, norm: str, factor, offset) -> None:
    model = make_model(**settings_of("prefix", norm))
    plain, other = run(model, walks_BCL), run(model, walks_BCL * factor + offset)
    expected = forecasts(plain) * factor + offset
    scale_BCN1 = plain.statistics.scale_BCN1 * factor
    assert ((forecasts(other) - expected) / scale_BCN1).abs().max() < 1e-4


@pytest.mark.parametrize("filler", [1e30, float("nan"), float("-inf")])
@pytest.mark.parametrize("norm", ["prefix", "window"])
def test_values_under_the_mask_never_matter(make_model, walks_BCL, norm: str, filler) -> None:
    model = make_model(**settings_of("prefix", norm))
    observed_BCL = torch.rand(walks_BCL.shape, generator=torch.Generator().manual_seed(0)) > 0.3
    with torch.no_grad():
        plain = model(walks_BCL, observed_BCL)
        filled = model(walks_BCL.masked_fill(~observed_BCL, filler), observed_BCL)
        whole = run(model, walks_BCL)
    assert torch.equal(forecasts(plain), forecasts(filled))
    assert not torch.equal(forecasts(plain), forecasts(whole)), "that they are missing does matter"


@pytest.mark.parametrize("router", [*MODES, "dense"])
@pytest.mark.parametrize("norm", ["prefix", "window"])
def test_window_without_any_observation_has_a_finite_output(make_model, router, norm) -> None:
    output = run(make_model(**settings_of(router, norm)), torch.full((2, 1, 64), torch.nan))
    assert forecasts(output).isfinite().all()
    assert output.statistics.is_degenerate_BCN.all()


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 63])
def test_last_token_ends_at_the_forecast_origin(make_model, walks_BCL, length: int) -> None:
    model = make_model()
    short = run(model, walks_BCL[..., -length:])
    patches = -(-length // 8)
    assert short.prediction_BCNPK.shape[2] == patches
    # The same as a window of whole patches that starts with points that are not observed.
    filled_BCL = walks_BCL[..., -patches * 8 :].clone()
    filled_BCL[..., : patches * 8 - length] = torch.nan
    torch.testing.assert_close(forecasts(short), forecasts(run(model, filled_BCL)))


def test_variates_and_windows_are_routed_and_predicted_alike(make_model) -> None:
    model = make_model()
    values_BCL = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    together = run(model, values_BCL).prediction_BCNPK
    apart = run(model, values_BCL.reshape(6, 1, 64)).prediction_BCNPK
    torch.testing.assert_close(together.flatten(0, 1), apart.flatten(0, 1))


def test_output_has_a_routing_per_expert_layer_and_none_if_dense(make_model, walks_BCL) -> None:
    model = make_model()
    output = run(model, walks_BCL)
    assert len(output.routings) == len(model.routers()) == 2
    assert [routing.load_E.sum() for routing in output.routings] == [5 * 8 * 2] * 2
    dense = make_model(**settings_of("dense", "prefix"))
    assert run(dense, walks_BCL).routings == ()
    assert dense.routers() == []


def test_quantile_head_predicts_a_value_per_level(make_model, walks_BCL) -> None:
    output = run(make_model(head=QuantileHeadConfig(levels=(0.1, 0.5))), walks_BCL)
    assert output.prediction_BCNPK.shape == (5, 1, 8, 8, 2)


def test_start_is_a_function_of_the_seed_alone(tiny_config) -> None:
    torch.manual_seed(1)
    first = TimeTracker(tiny_config, seed=4).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = TimeTracker(tiny_config, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = TimeTracker(tiny_config, seed=5).state_dict()
    assert not torch.equal(first["embed.values.weight"], other["embed.values.weight"])
    experts = "blocks.0.feed_forward.experts.down_weight"
    assert not torch.equal(first[experts], other[experts])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patch_stride": 3}, r"patch_stride \(3\) must divide patch_length \(8\)"),
        ({"patch_stride": 0}, r"patch_stride \(0\)"),
        ({"context_length": 7}, r"context_length \(7\).*patch_length is 8"),
        ({"context_length": 67}, r"context_length \(67\).*nearest are 64 and 72"),
        ({"d_model": 18}, r"d_model \(18\).*num_heads \(2\)"),
        ({"dropout": 1.0}, r"dropout \(1\.0\)"),
    ],
)
def test_impossible_sizes_are_refused_by_name(tiny_config, settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(tiny_config, **settings)


def test_window_is_the_context_and_one_patch() -> None:
    config = TimeTrackerConfig(patch_length=16, patch_stride=8, context_length=64)
    assert config.window_length == 80
