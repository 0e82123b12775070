"""Shapes: D model width."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tsmoe.nn.rms_norm import EPSILON, RMSNorm

SHAPES = ((7, 12), (3, 2, 5, 12), (0, 12))


def both(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Output and gradients of ours and of torch's own norm, in that order."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1])
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    norm.to(dtype)
    tokens = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(shape, generator=generator).to(dtype)
    found = []
    for call in (norm, lambda t: F.rms_norm(t, (shape[-1],), norm.weight, EPSILON)):
        output = call(tokens)
        found.append((output, *torch.autograd.grad(output, (tokens, norm.weight), gradient)))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_gradients_are_those_of_torch(shape) -> None:
    for ours, theirs in zip(*both(shape, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bf16_tokens_are_normed_in_float32() -> None:
    (output, tokens_gradient, weight_gradient), theirs = both((64, 12), torch.bfloat16)
    assert output.dtype == tokens_gradient.dtype == torch.bfloat16
    # One rounding to bf16, whose step is 2^-8 of a value; sums over rows lose no more.
    for ours, expected in zip((output, tokens_gradient, weight_gradient), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-8)


def test_autocast_tokens_keep_their_precision_beside_float32_weights() -> None:
    norm = RMSNorm(12)
    tokens = torch.randn(5, 12, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = norm(tokens)
    output.backward(torch.ones_like(output))
    assert output.dtype == tokens.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


def test_tokens_of_zeros_stay_zeros_with_a_finite_gradient() -> None:
    norm = RMSNorm(12)
    tokens = torch.zeros(3, 12, requires_grad=True)
    output = norm(tokens)
    output.backward(torch.ones_like(output))
    assert output.abs().max() == 0
    # The derivative there is 1/sqrt(epsilon).
    torch.testing.assert_close(tokens.grad, torch.full((3, 12), EPSILON**-0.5))


def test_only_tokens_and_one_number_each_are_kept_for_the_backward_pass() -> None:
    norm = RMSNorm(12)
    tokens = torch.randn(7, 12, requires_grad=True)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(tokens)
    assert sorted(tensor.numel() for tensor in kept) == [7, 12, 7 * 12]
    assert any(tensor.data_ptr() == tokens.data_ptr() for tensor in kept)
