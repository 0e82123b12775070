import numpy as np
import pytest
import torch
from torch import Tensor

from tsmoe.nn.instance_norm import InstanceStatistics, instance_statistics

ENDS = torch.tensor([4, 8, 12, 16])


def measure(values_BCL: Tensor, observed_BCL: Tensor, mode: str) -> InstanceStatistics:
    return instance_statistics(values_BCL, observed_BCL, ENDS, mode=mode)


def random_windows(level: float, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values_BCL = spread * torch.randn(3, 2, 16, generator=generator) + level
    observed_BCL = torch.rand(3, 2, 16, generator=generator) > 0.3
    return values_BCL, observed_BCL


# Far above zero the mean of squares is resolved in float32 to the variance itself, or worse; the
# last case is near the floor of the scale, 1e-6 of the level.
@pytest.mark.parametrize(("level", "spread"), [(0, 1), (0, 1e-9), (2e4, 1), (1e6, 50), (1e6, 1)])
@pytest.mark.parametrize("mode", ["window", "prefix"])
def test_statistics_are_numpys_over_observed_points(level: float, spread: float, mode: str) -> None:
    values_BCL, observed_BCL = random_windows(level, spread)
    statistics = measure(values_BCL, observed_BCL, mode)
    for place in np.ndindex(3, 2, 4):
        b, c, n = place
        end = 16 if mode == "window" else int(ENDS[n])
        seen = values_BCL[b, c, :end][observed_BCL[b, c, :end]].double().numpy()
        assert len(seen) > 1
        loc, scale = statistics.loc_BCN1[place].item(), statistics.scale_BCN1[place].item()
        # float32 results: 1e-6 of the number.
        assert loc == pytest.approx(seen.mean(), rel=1e-6, abs=1e-6 * spread)
        assert scale == pytest.approx(max(seen.std(), 1e-6 * abs(seen.mean())), rel=1e-5)


@pytest.mark.parametrize("mode", ["window", "prefix"])
@pytest.mark.parametrize("filler", [1e30, float("nan"), float("inf")])
def test_values_that_are_not_observed_do_not_matter(mode: str, filler: float) -> None:
    values_BCL, observed_BCL = random_windows(5.0)
    plain = measure(values_BCL, observed_BCL, mode)
    filled = measure(values_BCL.masked_fill(~observed_BCL, filler), observed_BCL, mode)
    assert torch.equal(filled.loc_BCN1, plain.loc_BCN1)
    assert torch.equal(filled.scale_BCN1, plain.scale_BCN1)


def test_prefix_statistics_do_not_know_the_future() -> None:
    values_BCL, observed_BCL = random_windows(5.0)
    before = measure(values_BCL, observed_BCL, "prefix")
    values_BCL[..., 12:] = 1e6
    after = measure(values_BCL, observed_BCL, "prefix")
    assert torch.equal(after.loc_BCN1[:, :, :3], before.loc_BCN1[:, :, :3])
    assert torch.equal(after.scale_BCN1[:, :, :3], before.scale_BCN1[:, :, :3])
    assert (after.loc_BCN1[:, :, 3] > before.loc_BCN1[:, :, 3] + 1000).all()
    window = measure(values_BCL, observed_BCL, "window")
    assert (window.loc_BCN1[:, :, 0] > before.loc_BCN1[:, :, 0] + 1000).all()


def test_location_is_zero_until_something_is_observed() -> None:
    values_BCL = torch.full((1, 1, 16), 7.0)
    observed_BCL = torch.arange(16)[None, None] >= 9
    statistics = measure(values_BCL, observed_BCL, "prefix")
    assert statistics.loc_BCN1.flatten().tolist() == [0, 0, 7, 7]


@pytest.mark.parametrize("mode", ["window", "prefix"])
def test_constant_and_empty_pasts_are_degenerate(mode: str) -> None:
    values_BCL = torch.full((1, 3, 16), 1e3)
    values_BCL[0, 1, 6] += 1
    observed_BCL = torch.ones(1, 3, 16, dtype=torch.bool)
    observed_BCL[0, 2] = False
    statistics = measure(values_BCL, observed_BCL, mode)
    jump = [True, False, False, False] if mode == "prefix" else [False] * 4
    assert statistics.is_degenerate_BCN[0].tolist() == [[True] * 4, jump, [True] * 4]
    assert (statistics.scale_BCN1 > 0).all()
    assert statistics.loc_BCN1.isfinite().all()


def test_spread_below_what_float32_resolves_is_degenerate() -> None:
    noise_L = torch.randn(16, generator=torch.Generator().manual_seed(0))
    values_BCL = torch.stack((1e6 + noise_L, 1e3 + noise_L))[None]
    observed_BCL = torch.ones_like(values_BCL, dtype=torch.bool)
    statistics = measure(values_BCL, observed_BCL, "window")
    assert statistics.is_degenerate_BCN[0, :, 0].tolist() == [True, False]
