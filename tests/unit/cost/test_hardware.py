import pytest
import torch

from tsmoe.cost.hardware import GPUS, find_gpu, measure_gemm_rate, peak_flops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("h200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A1000", None),
        ("AMD EPYC", None),
    ],
)
def test_peak_is_that_of_the_named_gpu(name, bf16) -> None:
    assert peak_flops(name, "bf16") == bf16


def test_smaller_memory_is_told_by_the_name() -> None:
    small, large = find_gpu("NVIDIA A100-SXM4-40GB"), find_gpu("NVIDIA A100-SXM4-80GB")
    assert small is not None
    assert large is not None
    assert small.memory_gib < 40 < large.memory_gib


def test_every_gpu_is_found_by_its_own_name() -> None:
    assert all(find_gpu(name) == gpu for name, gpu in GPUS.items())


def test_measured_rate_is_that_of_a_processor_and_leaves_threads_as_they_were() -> None:
    threads = torch.get_num_threads()
    rate = measure_gemm_rate("fp32", 1, size=128, rounds=2)
    assert 1e8 < rate < 1e13
    assert torch.get_num_threads() == threads
