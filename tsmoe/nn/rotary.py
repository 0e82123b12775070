"""Rotary position embedding on the time index.

Shapes: X windows and variates, S tokens, H heads, 1 kept for broadcasting; d is the head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def rotary_tables(time_index_S: Tensor, head_width: int, *, base: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of shape (S, d/2) in float32 for integer time indices.

    The index is that of the patch in time, equal for all variates, so that permuting variates
    permutes the output (a flattened index would not).

    Source: RoFormer (arXiv 2104.09864), as in Time Tracker (arXiv 2505.15151), Eq. (3).
    """
    half = head_width // 2
    exponent = torch.arange(half, device=time_index_S.device, dtype=torch.float32) / half
    angle_Sd = time_index_S.float()[:, None] * base**-exponent
    return angle_Sd.cos(), angle_Sd.sin()


def split_rotated(
    projected_XS3Hd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor, *, is_paired: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query_XSHd, key_XSHd and value_XSHd, each pair of coordinates turned by its angle.

    Values are not turned; dot products of queries and keys see differences of indices.

    Overwrites the projection, whose own backward pass does not need it: kept are three tensors of
    the model width instead of five. One node of the graph: left to autograd, the halves of each
    head and the three parts would be copied together again and again, a sixth of a layer's time
    between its projections on CPU.

    Args:
        projected_XS3Hd: in one piece; of queries, keys and values.
        cos_Sd: of the angles, see `rotary_tables`.
        sin_Sd: of the angles.
        is_paired: whether coordinates that turn together are neighbours, as they are in what comes
            back then; else they are half a head apart.
    """
    if is_paired:
        return _TurnedPairs.apply(projected_XS3Hd, torch.complex(cos_Sd, sin_Sd))
    cos_Sd, sin_Sd = cos_Sd.to(projected_XS3Hd.dtype), sin_Sd.to(projected_XS3Hd.dtype)
    if torch.compiler.is_compiling():
        return _split_rotated_plainly(projected_XS3Hd, cos_Sd, sin_Sd)
    return _SplitRotated.apply(projected_XS3Hd, cos_Sd, sin_Sd)


def _split_rotated_plainly(
    projected_XS3Hd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # The compiler joins the steps by itself, and does not take results written into views.
    first, second = projected_XS3Hd[:, :, :2].chunk(2, dim=-1)
    cos_S11d, sin_S11d = cos_Sd[:, None, None], sin_Sd[:, None, None]
    turned = (first * cos_S11d - second * sin_S11d, second * cos_S11d + first * sin_S11d)
    query_XSHd, key_XSHd = torch.cat(turned, dim=-1).unbind(2)
    return query_XSHd, key_XSHd, projected_XS3Hd[:, :, 2]


class _SplitRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, projected_XS3Hd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos_Sd, sin_Sd)
        cos_S11d, sin_S11d = cos_Sd[:, None, None], sin_Sd[:, None, None]
        first, second = projected_XS3Hd[:, :, :2].chunk(2, dim=-1)
        unturned = first.clone()
        first.mul_(cos_S11d).addcmul_(second, sin_S11d, value=-1)
        second.mul_(cos_S11d).addcmul_(unturned, sin_S11d)
        query_XSHd, key_XSHd, value_XSHd = projected_XS3Hd.unbind(2)
        return query_XSHd, key_XSHd, value_XSHd

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads_XSHd: Tensor) -> tuple[Tensor, None, None]:
        cos_Sd, sin_Sd = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_query_XSHd, grad_key_XSHd, grad_value_XSHd = grads_XSHd
        tokens, (heads, width) = grad_query_XSHd.shape[:2], grad_query_XSHd.shape[2:]
        grad_XS3Hd = grad_query_XSHd.new_empty(*tokens, 3, heads, width)
        cos_S1d, sin_S1d = cos_Sd[:, None], sin_Sd[:, None]
        for part, turned_XSHd in enumerate((grad_query_XSHd, grad_key_XSHd)):
            first, second = turned_XSHd.chunk(2, dim=-1)
            grad_first, grad_second = grad_XS3Hd[:, :, part].chunk(2, dim=-1)
            torch.mul(first, cos_S1d, out=grad_first).addcmul_(second, sin_S1d)
            torch.mul(second, cos_S1d, out=grad_second).addcmul_(first, sin_S1d, value=-1)
        grad_XS3Hd[:, :, 2] = grad_value_XSHd
        return grad_XS3Hd, None, None


class _TurnedPairs(torch.autograd.Function):
    """Multiply pairs as complex numbers, all heads of queries and keys in one go."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, projected_XS3Hd: Tensor, turn_Sd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turn_Sd)
        _turn_pairs(projected_XS3Hd, turn_Sd)
        query_XSHd, key_XSHd, value_XSHd = projected_XS3Hd.unbind(2)
        return query_XSHd, key_XSHd, value_XSHd

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads_XSHd: Tensor) -> tuple[Tensor, None]:
        (turn_Sd,) = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_XS3Hd = torch.stack(grads_XSHd, dim=2)
        _turn_pairs(grad_XS3Hd, turn_Sd.conj())
        return grad_XS3Hd, None


def _turn_pairs(parts_XS3Hd: Tensor, turn_Sd: Tensor) -> None:
    """Turn queries and keys in place."""
    parts_XS2Hd = parts_XS3Hd[:, :, :2]
    # There are no complex numbers of half precision; float32 at least.
    exact_XS2Hd = parts_XS2Hd.to(torch.promote_types(parts_XS3Hd.dtype, torch.float32))
    pairs = torch.view_as_complex(exact_XS2Hd.view(*exact_XS2Hd.shape[:2], -1, 2))
    heads = pairs.shape[-1] // turn_Sd.shape[-1]
    # One row for all heads: inner loops are as long as a token is wide.
    pairs.mul_(turn_Sd.repeat(1, heads).to(pairs.dtype))
    if exact_XS2Hd.dtype != parts_XS3Hd.dtype:
        parts_XS2Hd.copy_(exact_XS2Hd)
