"""What GPUs can do by their data sheets, and what this machine's processor does by trial."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU by its maker's data sheet; dense matrix products, no structured sparsity."""

    bf16_flops: float
    """Operations a second of bf16 tensor cores that accumulate in float32; 0 without them."""
    fp32_flops: float
    """Operations a second in true float32: torch uses TF32 only where it is told to."""
    memory_gib: float
    """Memory that torch finds, in GiB."""
    memory_bandwidth: float
    """Bytes a second, read and write together."""
    link_bandwidth: float
    """Bytes a second to other GPUs of its node, in one direction, by NVLink or else PCIe."""


# By name as in `torch.cuda.get_device_name`, lower case; the longest name that fits counts.
GPUS = {
    "b200": Gpu(bf16_flops=2250e12, fp32_flops=75e12, memory_gib=178.0, memory_bandwidth=7.7e12,
                link_bandwidth=900e9),
    "h200": Gpu(bf16_flops=989e12, fp32_flops=67e12, memory_gib=139.8, memory_bandwidth=4.8e12,
                link_bandwidth=450e9),
    "h100": Gpu(bf16_flops=989e12, fp32_flops=67e12, memory_gib=79.1, memory_bandwidth=3.35e12,
                link_bandwidth=450e9),
    "h100 pcie": Gpu(bf16_flops=756e12, fp32_flops=51e12, memory_gib=79.1, memory_bandwidth=2.0e12,
                     link_bandwidth=64e9),
    "h800": Gpu(bf16_flops=989e12, fp32_flops=67e12, memory_gib=79.1, memory_bandwidth=3.35e12,
                link_bandwidth=200e9),
    "a100": Gpu(bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=79.1, memory_bandwidth=2.0e12,
                link_bandwidth=300e9),
    "a100-sxm4-40gb": Gpu(bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=39.4,
                          memory_bandwidth=1.55e12, link_bandwidth=300e9),
    "a100-pcie-40gb": Gpu(bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=39.4,
                          memory_bandwidth=1.55e12, link_bandwidth=32e9),
    "a800": Gpu(bf16_flops=312e12, fp32_flops=19.5e12, memory_gib=79.1, memory_bandwidth=2.0e12,
                link_bandwidth=200e9),
    "l40s": Gpu(bf16_flops=362e12, fp32_flops=91.6e12, memory_gib=44.4, memory_bandwidth=0.864e12,
                link_bandwidth=32e9),
    "a40": Gpu(bf16_flops=149.7e12, fp32_flops=37.4e12, memory_gib=44.4, memory_bandwidth=0.696e12,
               link_bandwidth=56e9),
    "a10": Gpu(bf16_flops=125e12, fp32_flops=31.2e12, memory_gib=22.0, memory_bandwidth=0.6e12,
               link_bandwidth=32e9),
    "a10g": Gpu(bf16_flops=70e12, fp32_flops=31.5e12, memory_gib=22.0, memory_bandwidth=0.6e12,
                link_bandwidth=32e9),
    "l4": Gpu(bf16_flops=121e12, fp32_flops=30.3e12, memory_gib=22.0, memory_bandwidth=0.3e12,
              link_bandwidth=32e9),
    "v100": Gpu(bf16_flops=0.0, fp32_flops=15.7e12, memory_gib=31.7, memory_bandwidth=0.9e12,
                link_bandwidth=150e9),
    "rtx 4090": Gpu(bf16_flops=165e12, fp32_flops=82.6e12, memory_gib=23.6,
                    memory_bandwidth=1.008e12, link_bandwidth=32e9),
    "rtx 3090": Gpu(bf16_flops=71e12, fp32_flops=35.6e12, memory_gib=23.6,
                    memory_bandwidth=0.936e12, link_bandwidth=32e9),
}  # fmt: skip


def find_gpu(device_name: str) -> Gpu | None:
    """Find a GPU by torch's name of it, such as "NVIDIA H100 80GB HBM3", or a part of that."""
    words = f" {device_name.lower().replace('_', ' ')} "
    # Bounded by what is no letter or digit: "a10" is no part of "a100".
    fitting = [
        name
        for name in GPUS
        if any(
            not words[at - 1].isalnum() and not words[at + len(name)].isalnum()
            for at in range(1, len(words) - len(name))
            if words.startswith(name, at)
        )
    ]
    if "h100" in fitting and "pcie" in words:
        return GPUS["h100 pcie"]
    return GPUS[max(fitting, key=len)] if fitting else None


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return operations a second of a GPU's dense matrix products in fp32 or bf16.

    Returns:
        None where the GPU is not in the table, or has no units for the precision.
    """
    gpu = find_gpu(device_name)
    if gpu is None:
        return None
    return (gpu.bf16_flops if precision == "bf16" else gpu.fp32_flops) or None


def measure_gemm_rate(precision: str, threads: int, *, size: int = 1024, rounds: int = 5) -> float:
    """Time square matrix products on this machine's processor: the rate that it can reach.

    Takes a quarter of a second or so; the best round counts, as others may use the machine.

    Args:
        precision: fp32 or bf16.
        threads: of torch, while it is measured.
        size: of the matrices.
        rounds: how often; each is at least one product and 20 ms long.

    Returns:
        Operations a second, a multiply-add as 2.
    """
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        result = left @ right  # the first call sets up its kernel
        best = 0.0
        for _ in range(rounds):
            products, begun = 0, time.perf_counter()
            while (seconds := time.perf_counter() - begun) < 0.02:
                torch.mm(left, right, out=result)
                products += 1
            best = max(best, products * 2 * size**3 / seconds)
        return best
    finally:
        torch.set_num_threads(before)
