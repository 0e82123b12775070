"""Float32 matrix products on the processor by oneDNN, where that is exact.

Torch multiplies float32 matrices by MKL, which keeps to AVX2 on AMD's processors: 105 GFLOP/s on a
core where oneDNN's AVX-512 kernels reach 240, with the same rounding error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Float32 rounds products of a few hundred terms to some 3e-7, bfloat16 to 2e-3.
_LARGEST_ERROR = 1e-5
# Rows, inner size, columns: oneDNN picks kernels by size, and all must be exact.
_TRIED = ((8, 64, 64), (64, 256, 512), (512, 512, 512))


@contextmanager
def exact_onednn_matmul() -> Iterator[None]:
    """Multiply float32 matrices by oneDNN in this block, or decorated function.

    Torch hands them to oneDNN only where it is allowed to round to bfloat16 inside, which oneDNN
    does on processors with matrix tiles (AMX) and on no others. So that is tried out first, and
    where a product is less than exact to float32 nothing is changed. Other types and devices are
    not touched.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if not is_onednn_exact():
        yield
        return
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def is_onednn_exact() -> bool:
    """Say whether oneDNN's float32 products keep float32's precision here. Takes some ms, once."""
    if not torch.backends.mkldnn.is_available():
        return False
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        return all(_relative_error(*sizes) < _LARGEST_ERROR for sizes in _TRIED)
    finally:
        setting.fp32_precision = before


def _relative_error(rows: int, inner: int, columns: int) -> float:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(inner, columns, generator=generator)
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())
