"""Root-mean-square norm that keeps its input alone and passes few times over memory.

Shapes: D model width; T tokens, 1 kept for broadcasting.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPSILON = 1e-6
"""Added to the mean square: a token of zeros has no direction to keep."""


class RMSNorm(nn.Module):
    """Scale each token to a root mean square of 1, then each coordinate by a learned weight.

    Source: arXiv 1910.07467. Arithmetic is float32 at least, the result in the tokens' precision.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        # torch's own is one kernel on CUDA where precisions agree, and one when compiled; else it
        # is made of a dozen operations that keep the normalised tokens in float32 too.
        is_one_kernel = tokens.is_cuda and tokens.dtype == self.weight.dtype
        if is_one_kernel or torch.compiler.is_compiling():
            return F.rms_norm(tokens, self.weight.shape, self.weight, EPSILON)
        return _RMSNorm.apply(tokens, self.weight)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_D: Tensor) -> Tensor:
        exact = torch.promote_types(torch.float32, tokens.dtype)
        exact_TD = tokens.flatten(0, -2).to(exact)
        norm_T1 = torch.linalg.vector_norm(exact_TD, dim=-1, keepdim=True)
        inverse_T1 = norm_T1.square_().div_(len(weight_D)).add_(EPSILON).rsqrt_()
        ctx.save_for_backward(tokens, weight_D, inverse_T1)
        normed_TD = exact_TD * inverse_T1
        normed_TD *= weight_D
        return normed_TD.to(tokens.dtype).reshape(tokens.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weight_D, inverse_T1 = ctx.saved_tensors
        exact_TD = tokens.flatten(0, -2).to(inverse_T1.dtype)
        gradient_TD = gradient.flatten(0, -2).to(inverse_T1.dtype)
        exact_weight_D = weight_D.to(inverse_T1.dtype)
        product_TD = gradient_TD * exact_TD
        # Both sums over the product are matrix-vector products: no pass of their own over memory.
        weight_gradient_D = product_TD.T.mv(inverse_T1[:, 0])
        along_T1 = product_TD.mv(exact_weight_D)[:, None]
        along_T1 *= inverse_T1.pow(3).div_(-len(weight_D))
        result_TD = torch.mul(gradient_TD, exact_weight_D, out=product_TD)
        result_TD *= inverse_T1
        result_TD.addcmul_(exact_TD, along_T1)
        result = result_TD.to(tokens.dtype).reshape(tokens.shape)
        return result, weight_gradient_D.to(weight_D.dtype)
