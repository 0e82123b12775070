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
def exact_onednn_matmul(device: torch.device | None = None) -> Iterator[None]:
    """Multiply float32 matrices by oneDNN in this block, or decorated function.

    Torch hands them to oneDNN only where it is allowed to round to bfloat16 inside, which oneDNN
    does on processors with matrix tiles (AMX) and on no others. So that is tried out first, and
    where a product is less than exact to float32 nothing is changed. Other types are not touched.

    The setting is the process', for all its threads, and may not be changed by two at once. While
    it holds `torch.get_float32_matmul_precision` raises; so do kernels that torch.compile chooses
    by it, such as FlexAttention on CUDA.

    Args:
        device: of the matrices; None: the processor. For any other one nothing is changed.
    """
    if (device is not None and device.type != "cpu") or not is_onednn_exact():
        yield
        return
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
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
    here: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    left, right = torch.randn(rows, inner, **here), torch.randn(inner, columns, **here)
    exact = left.double() @ right.double()
    # The answer is kept for good: a caller's autocast must not decide it.
    with torch.autocast("cpu", enabled=False):
        product = left @ right
    return float((product.double() - exact).norm() / exact.norm())
