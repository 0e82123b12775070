"""Causal attention with few tokens, against torch's own kernel."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tsmoe.nn.causal_attention import attend_to_past

HEADS, PATCHES, WIDTH = 2, 6, 8


def heads_of_tokens(*, windows: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, as projections give them: heads beside tokens in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (windows, PATCHES, HEADS, WIDTH)
    drawn = [torch.randn(shape, generator=generator) for _ in range(3)]
    return [part.to(dtype).transpose(1, 2).requires_grad_() for part in drawn]


def gradients(output: Tensor, parts: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape).to(output.dtype)
    return list(torch.autograd.grad(output, parts, weights))


@pytest.mark.parametrize("has_mask", [False, True])
def test_few_tokens_give_what_the_kernel_gives(has_mask: bool) -> None:
    parts = heads_of_tokens()
    mask = None
    if has_mask:  # a window of two series, the second of which starts at the third token
        mask = torch.ones(PATCHES, PATCHES, dtype=torch.bool).tril().repeat(3, 1, 1, 1)
        mask[1, :, 2:, :2] = False
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=mask is None)
    found = attend_to_past(*parts, mask)
    # Sums of few terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    pairs = zip(gradients(found, parts), gradients(expected, parts), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_few_tokens_in_bf16_differ_by_its_rounding_only() -> None:
    parts = heads_of_tokens(dtype=torch.bfloat16)
    exact = F.scaled_dot_product_attention(*(p.float() for p in parts), is_causal=True)
    # Scores and weights are rounded to 8 bits: some 4e-3 of values of about 1.
    torch.testing.assert_close(attend_to_past(*parts).float(), exact, rtol=2e-2, atol=2e-2)


def test_many_tokens_take_the_kernel_that_holds_no_weights() -> None:
    query = torch.randn(1, 1, 200, 8)
    with torch.profiler.profile() as profile:
        attend_to_past(query, query, query)
    assert any("scaled_dot_product" in event.key for event in profile.key_averages())
