from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tsmoe.nn.query_key_value import QueryKeyValue, wants_pairs
from tsmoe.nn.rotary import rotary_tables, split_rotated

TOKENS, HEADS, WIDTH = 5, 3, 8


def heads_and_gradient(dtype: torch.dtype, *, is_paired: bool) -> list[Tensor]:
    """Scores of queries and keys, values, and the gradient of the weights."""
    torch.manual_seed(0)
    project = QueryKeyValue(HEADS * WIDTH, HEADS).to(torch.float64)
    tables = rotary_tables(torch.arange(TOKENS), WIDTH, base=100.0)
    tokens = torch.randn(2, TOKENS, HEADS * WIDTH, dtype=torch.float64)
    slopes: Sequence[Tensor] = (
        torch.randn(2, HEADS, TOKENS, TOKENS),
        torch.randn(2, TOKENS, HEADS, WIDTH),
    )
    projected = project.to(dtype)(tokens.to(dtype), is_paired=is_paired)
    projected = projected.unflatten(-1, (3, HEADS, WIDTH))
    query, key, value = split_rotated(projected, *tables, is_paired=is_paired)
    scores = torch.einsum("xshd,xthd->xhst", query, key)
    slopes = [slope.to(dtype) for slope in slopes]
    gradient = torch.autograd.grad((scores, value), project.weight, slopes)
    return [scores, value, *gradient]


def test_pairs_give_the_scores_values_and_gradients_of_halves() -> None:
    pairs = heads_and_gradient(torch.float64, is_paired=True)
    halves = heads_and_gradient(torch.float64, is_paired=False)
    for one, other in zip(pairs, halves, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bf16_pairs_are_turned_in_float32() -> None:
    pairs = heads_and_gradient(torch.bfloat16, is_paired=True)
    exact = heads_and_gradient(torch.float64, is_paired=False)
    assert {part.dtype for part in pairs} == {torch.bfloat16}
    for one, other in zip(pairs, exact, strict=True):
        # Sums of some tens of products, each off by up to 2^-8 of it.
        assert (one - other).norm() < 2**-6 * other.norm()


@pytest.mark.parametrize("is_paired", [True, False])
def test_projection_is_overwritten_not_copied(is_paired) -> None:
    projected = torch.randn(2, TOKENS, 3, HEADS, WIDTH)
    tables = rotary_tables(torch.arange(TOKENS), WIDTH, base=100.0)
    query, *_ = split_rotated(projected, *tables, is_paired=is_paired)
    assert query.data_ptr() == projected.data_ptr()


def test_processor_wants_pairs_and_others_do_not() -> None:
    assert wants_pairs(torch.zeros(1))
    assert not wants_pairs(torch.zeros(1, device="meta"))
