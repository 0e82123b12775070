"""What every head must do. A new head adds its configurations below."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from tsmoe.heads import (
    HeadConfig,
    NextPatchHead,
    PointHeadConfig,
    QuantileHeadConfig,
    build_head,
)

B, C, N, P, D = 3, 2, 4, 5, 8

EXAMPLES: tuple[HeadConfig, ...] = (
    PointHeadConfig(),
    QuantileHeadConfig(),
    QuantileHeadConfig(levels=(0.05, 0.5, 0.75)),
    QuantileHeadConfig(levels=(0.5,)),
)


@pytest.fixture(params=EXAMPLES, ids=lambda c: f"{c.type}{len(getattr(c, 'levels', ()))}")
def head(request) -> NextPatchHead:
    torch.manual_seed(0)
    return build_head(request.param, D, P)


@pytest.fixture(name="tokens_BCND")
def random_tokens() -> Tensor:
    return torch.randn(B, C, N, D, generator=torch.Generator().manual_seed(1))


def test_every_head_has_an_example() -> None:
    assert {type(config) for config in EXAMPLES} == set(get_args(HeadConfig))


def test_one_value_per_point_and_level(head, tokens_BCND) -> None:
    values = len(head.quantile_levels) or 1
    prediction_BCNPK = head(tokens_BCND)
    assert prediction_BCNPK.shape == (B, C, N, P, values)
    assert head.point_forecast(prediction_BCNPK).shape == (B, C, N, P)


def test_error_is_zero_at_the_target_and_positive_elsewhere(head) -> None:
    target_BCNP = torch.randn(B, C, N, P)
    exact_BCNPK = target_BCNP[..., None].expand(-1, -1, -1, -1, len(head.quantile_levels) or 1)
    assert head.point_errors(exact_BCNPK, target_BCNP).abs().max() == 0
    for offset in (0.5, -0.5):
        assert head.point_errors(exact_BCNPK + offset, target_BCNP).min() > 0.01


def test_error_of_a_point_is_its_own(head, tokens_BCND) -> None:
    prediction_BCNPK = head(tokens_BCND).detach()
    target_BCNP = torch.zeros(B, C, N, P)
    before = head.point_errors(prediction_BCNPK, target_BCNP)
    target_BCNP[1, 0, 2, 3] += 5
    changed = head.point_errors(prediction_BCNPK, target_BCNP) != before
    assert changed.nonzero().tolist() == [[1, 0, 2, 3]]


def test_error_grows_by_its_power_of_the_scale(head, tokens_BCND) -> None:
    prediction_BCNPK = head(tokens_BCND)
    target_BCNP = torch.randn(B, C, N, P)
    torch.testing.assert_close(
        head.point_errors(3 * prediction_BCNPK, 3 * target_BCNP),
        head.point_errors(prediction_BCNPK, target_BCNP) * 3**head.error_power,
    )


def test_errors_are_float32_whatever_the_precision_of_the_model(head, tokens_BCND) -> None:
    prediction_BCNPK = head.bfloat16()(tokens_BCND.bfloat16())
    assert prediction_BCNPK.dtype == torch.bfloat16
    errors_BCNP = head.point_errors(prediction_BCNPK, torch.zeros(B, C, N, P))
    assert errors_BCNP.dtype == torch.float32


def test_gradients_reach_every_parameter(head, tokens_BCND) -> None:
    head.point_errors(head(tokens_BCND), torch.zeros(B, C, N, P)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_nothing_but_parameters_is_saved(head) -> None:
    assert set(head.state_dict()) == set(dict(head.named_parameters()))
