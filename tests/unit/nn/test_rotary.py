import torch

from tsmoe.nn.rotary import rotary_tables, rotate


def scores_at(query_d: torch.Tensor, key_d: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Dot products of one query and one key, each placed at every index."""
    tables = rotary_tables(indices, len(query_d), base=10000.0)
    queries = rotate(query_d.expand(len(indices), -1), *tables)
    keys = rotate(key_d.expand(len(indices), -1), *tables)
    return queries @ keys.T


def test_dot_product_depends_on_the_difference_of_indices_alone() -> None:
    torch.manual_seed(0)
    query_d, key_d = torch.randn(16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    near = scores_at(query_d, key_d, torch.arange(20))
    far = scores_at(query_d, key_d, torch.arange(20) + 37)
    # Angles are float32: an index of 57 radians is resolved to 4e-6.
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
    assert (near[0] - near[0, 0]).abs().max() > 0.1, "the difference does matter"


def test_rotation_keeps_lengths_and_index_zero() -> None:
    torch.manual_seed(0)
    heads_BHSd = torch.randn(2, 3, 5, 8)
    turned_BHSd = rotate(heads_BHSd, *rotary_tables(torch.arange(5), 8, base=10000.0))
    torch.testing.assert_close(turned_BHSd.norm(dim=-1), heads_BHSd.norm(dim=-1))
    torch.testing.assert_close(turned_BHSd[:, :, 0], heads_BHSd[:, :, 0], rtol=0, atol=0)
    assert (turned_BHSd[:, :, 1] - heads_BHSd[:, :, 1]).abs().max() > 0.1


def test_bfloat16_stays_bfloat16() -> None:
    heads_BHSd = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    tables = rotary_tables(torch.arange(3), 4, base=10000.0)
    assert rotate(heads_BHSd, *tables).dtype == torch.bfloat16
