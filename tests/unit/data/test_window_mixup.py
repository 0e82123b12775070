import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.data.mixup import mix_windows


def windows(values_BL: Tensor, observed_BL: Tensor | None = None) -> WindowBatch:
    observed_BL = (
        torch.ones_like(values_BL, dtype=torch.bool) if observed_BL is None else observed_BL
    )
    observed_BCL = observed_BL[:, None]
    return WindowBatch(
        values_BCL=torch.where(observed_BCL, values_BL[:, None], 0),
        observed_BCL=observed_BCL,
        is_target_BCL=observed_BCL,
        series_ids_B=torch.arange(len(values_BL)),
    )


def standardised(values_L: Tensor) -> Tensor:
    return (values_L - values_L.mean()) / values_L.std(correction=0)


def test_share_0_leaves_a_window_bit_for_bit_as_it_is() -> None:
    batch, partners = windows(torch.randn(2, 8) * 1e5), windows(torch.randn(2, 8))
    mixed = mix_windows(batch, partners, torch.tensor([0.0, 0.3]))
    assert torch.equal(mixed.values_BCL[0], batch.values_BCL[0])
    assert not torch.equal(mixed.values_BCL[1], batch.values_BCL[1])


def test_mixed_window_is_the_weighted_sum_whatever_the_units() -> None:
    own_L, partner_L = torch.randn(32) * 1000 + 5, torch.randn(32) * 1e-3
    mixed = mix_windows(windows(own_L[None]), windows(partner_L[None]), torch.tensor([-0.25]))
    expected_L = 0.75 * standardised(own_L) - 0.25 * standardised(partner_L)
    # Standardised in float32.
    torch.testing.assert_close(mixed.values_BCL[0, 0], expected_L, rtol=1e-4, atol=1e-4)


def test_mixed_point_is_observed_where_both_are() -> None:
    own_BL = torch.tensor([[True, True, False, True]])
    partner_BL = torch.tensor([[True, False, True, True]])
    batch = windows(torch.randn(1, 4), own_BL)
    partners = windows(torch.randn(1, 4), partner_BL)
    mixed = mix_windows(batch, partners, torch.tensor([0.5]))
    assert mixed.observed_BCL[0, 0].tolist() == [True, False, False, True]
    assert mixed.is_target_BCL[0, 0].tolist() == [True, False, False, True]
    assert mixed.values_BCL[0, 0, 1:3].tolist() == [0, 0]
    alone = mix_windows(batch, partners, torch.tensor([0.0]))
    assert torch.equal(alone.observed_BCL, batch.observed_BCL)


def test_constant_partner_adds_nothing() -> None:
    own_L = torch.randn(16)
    mixed = mix_windows(
        windows(own_L[None]), windows(torch.full((1, 16), 3.0)), torch.tensor([0.5])
    )
    torch.testing.assert_close(
        mixed.values_BCL[0, 0], 0.5 * standardised(own_L), rtol=1e-5, atol=1e-6
    )
