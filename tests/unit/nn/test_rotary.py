import torch
from torch import Tensor

from tsmoe.nn.rotary import rotary_tables, split_rotated


def turn(heads_SHd: Tensor, indices_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the same heads for query, key and value, each token placed at its index."""
    tables = rotary_tables(indices_S, heads_SHd.shape[-1], base=10000.0)
    projected_1S3Hd = heads_SHd[None, :, None].repeat(1, 1, 3, 1, 1)
    query, key, value = split_rotated(projected_1S3Hd, *tables)
    return query[0], key[0], value[0]


def plainly_rotated(projected_XS3Hd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> list[Tensor]:
    """Rotate by complex numbers, left to autograd."""
    turn_S1d = torch.complex(cos_Sd, sin_Sd)[:, None]
    query, key, value = projected_XS3Hd.unbind(2)
    turned = [torch.complex(*part.chunk(2, dim=-1)) * turn_S1d for part in (query, key)]
    return [*(torch.cat((part.real, part.imag), dim=-1) for part in turned), value]


def test_dot_product_depends_on_the_difference_of_indices_alone() -> None:
    torch.manual_seed(0)
    heads_SHd = torch.randn(1, 1, 16, dtype=torch.float64).expand(20, 1, 16)

    def scores_from(first: int) -> Tensor:
        query, key, _ = turn(heads_SHd, torch.arange(20) + first)
        return query[:, 0] @ key[:, 0].T

    near, far = scores_from(0), scores_from(37)
    # Angles are float32: an index of 57 radians is resolved to 4e-6.
    torch.testing.assert_close(near, far, rtol=0, atol=1e-4)
    assert (near[0] - near[0, 0]).abs().max() > 0.1, "the difference does matter"


def test_rotation_keeps_lengths_index_zero_and_values() -> None:
    torch.manual_seed(0)
    heads_SHd = torch.randn(5, 3, 8)
    query, key, value = turn(heads_SHd, torch.arange(5))
    torch.testing.assert_close(query.norm(dim=-1), heads_SHd.norm(dim=-1))
    torch.testing.assert_close(query[0], heads_SHd[0], rtol=0, atol=0)
    assert (query[1] - heads_SHd[1]).abs().max() > 0.1
    assert torch.equal(query, key)
    assert torch.equal(value, heads_SHd)


def test_rotation_and_its_gradient_are_those_of_complex_numbers() -> None:
    torch.manual_seed(0)
    projected = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    tables = [table.double() for table in rotary_tables(torch.arange(5), 8, base=100.0)]
    slopes = torch.randn(3, 2, 5, 2, 8, dtype=torch.float64).unbind(0)
    found = split_rotated(projected.clone(), *tables)
    expected = plainly_rotated(projected, *tables)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found, projected, slopes)[0],
        torch.autograd.grad(expected, projected, slopes)[0],
        rtol=0,
        atol=1e-14,
    )


def test_bfloat16_stays_bfloat16() -> None:
    heads_SHd = torch.randn(3, 1, 4, dtype=torch.bfloat16)
    assert {part.dtype for part in turn(heads_SHd, torch.arange(3))} == {torch.bfloat16}
