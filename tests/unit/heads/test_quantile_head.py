import pytest
import torch

from tsmoe.heads.quantile import QuantileHead, QuantileHeadConfig

LEVELS = (0.1, 0.5, 0.8)


@pytest.fixture
def head() -> QuantileHead:
    return QuantileHead(QuantileHeadConfig(levels=LEVELS), 4, 3)


def test_error_is_twice_the_mean_pinball_loss_by_hand(head) -> None:
    # Target 2; the predictions 1, 2, 4 are below, at and above it.
    prediction_BCNPK = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 1, 1, 3)
    error = head.point_errors(prediction_BCNPK, torch.full((1, 1, 1, 1), 2.0))
    # 2 * (0.1 * 1 + 0 + (1 - 0.8) * 2) / 3
    assert error.item() == pytest.approx(2 * 0.5 / 3)


def test_gradient_pulls_each_level_by_its_own_share(head) -> None:
    prediction_BCNPK = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 1, 1, 1, 3).requires_grad_()
    head.point_errors(prediction_BCNPK, torch.full((1, 1, 1, 1), 2.0)).sum().backward()
    # Below the target by the level; at it the mean of both sides; above it by the rest of 1.
    expected = torch.tensor([-0.1, 0.0, 1 - 0.8]) * 2 / 3
    torch.testing.assert_close(prediction_BCNPK.grad.flatten(), expected)


def test_term_of_the_median_is_the_absolute_error() -> None:
    head = QuantileHead(QuantileHeadConfig(levels=(0.5,)), 4, 3)
    prediction_BCNPK, target_BCNP = torch.randn(2, 1, 3, 3, 1), torch.randn(2, 1, 3, 3)
    torch.testing.assert_close(
        head.point_errors(prediction_BCNPK, target_BCNP),
        (prediction_BCNPK[..., 0] - target_BCNP).abs(),
    )


def test_point_forecast_is_the_median(head) -> None:
    prediction_BCNPK = torch.randn(2, 1, 3, 3, 3)
    assert torch.equal(head.point_forecast(prediction_BCNPK), prediction_BCNPK[..., 1])


def test_loss_is_least_at_the_empirical_quantiles(head) -> None:
    truth = torch.randn(1001, generator=torch.Generator().manual_seed(0)).double()
    grid = torch.linspace(-3, 3, 601, dtype=torch.float64)
    target_BCNP = truth.reshape(-1, 1, 1, 1)
    for place, level in enumerate(LEVELS):
        losses = []
        for guess in grid:
            # The other levels are held still: their terms are a constant.
            prediction_BCNPK = torch.zeros(1, 1, 1, 1, 3, dtype=torch.float64)
            prediction_BCNPK[..., place] = guess
            losses.append(head.point_errors(prediction_BCNPK, target_BCNP).mean())
        best = grid[torch.stack(losses).argmin()].item()
        # The grid is 0.01 wide.
        assert best == pytest.approx(truth.quantile(level).item(), abs=0.02)


@pytest.mark.parametrize(
    "levels", [(0.5, 0.1), (0.1, 0.1, 0.5), (0.0, 0.5), (0.5, 1.0), (0.1, 0.9), ()]
)
def test_impossible_levels_are_refused_by_name(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels \[.*must ascend.*hold 0\.5") as caught:
        QuantileHeadConfig(levels=levels)
    assert all(str(level) in str(caught.value) for level in levels)
