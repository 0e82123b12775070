"""The machines that a job would run on, and where each number about them is from."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tsmoe.cost.hardware import GPUS, find_gpu, measure_gemm_rate
from tsmoe.errors import ConfigError
from tsmoe.nn.matmul import exact_onednn_matmul

# What a training step reaches of a data sheet's rate and of a link's, where nothing was measured.
COMPUTE_SHARE = 0.4
LINK_SHARE = 0.7
# Left for the CUDA context, libraries' workspaces, NCCL's buffers and fragmentation.
FREE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A number that a prediction rests on."""

    value: float
    source: str
    """Data sheet, measured (where), given, or assumed."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One rank's share of the machines."""

    name: str
    ranks_per_node: int
    memory: Assumption
    """Bytes that tensors of a rank may take."""
    flops: Assumption
    """Operations a second that a training step reaches."""
    peak_flops: Assumption
    """Operations a second that MFU is measured by."""
    memory_bandwidth: Assumption
    link_bandwidth: Assumption
    """Bytes a second to ranks of the same node, one direction."""
    network_bandwidth: Assumption
    """Bytes a second to other nodes, for each rank."""
    host_bandwidth: Assumption
    """Bytes a second between device and host memory."""
    latency: Assumption
    """Seconds of a collective that sends nothing between two ranks."""
    hop: Assumption
    """Seconds that each further step of a collective takes: a ring has as many as ranks, a tree
    twice the logarithm."""
    launch: Assumption
    """Seconds that a block's kernels take to start, forward and backward: the least it can take."""
    is_gpu: bool = True

    @property
    def assumptions(self) -> dict[str, Assumption]:
        """All numbers by name."""
        return {key: value for key, value in vars(self).items() if isinstance(value, Assumption)}


def gpu_machine(
    name: str,
    *,
    precision: str,
    ranks_per_node: int,
    network_gbps: float | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
) -> Machine:
    """Describe nodes of GPUs by data sheet; what is given takes its place.

    Args:
        name: of the GPU, as in `hardware.GPUS` or as torch calls it.
        precision: fp32 or bf16.
        ranks_per_node: GPUs of a node.
        network_gbps: Gbit/s of the network for each GPU.
        memory_gib: of each GPU.
        tflops: that a training step reaches.

    Raises:
        ConfigError: if the GPU is not known, or has no units for the precision.
    """
    gpu = find_gpu(name)
    if gpu is None:
        raise ConfigError(
            f"--gpu {name}: not in the table, which has {', '.join(GPUS)}; give --gpu of the most "
            "similar one with --memory-gib and --tflops"
        )
    peak = gpu.bf16_flops if precision == "bf16" else gpu.fp32_flops
    if not peak:
        raise ConfigError(
            f"--gpu {name} has no {precision} tensor cores; set training.precision=fp32"
        )
    sheet = f"data sheet of {name}"
    memory = (memory_gib or gpu.memory_gib) * 2**30
    gbps = network_gbps or 400.0
    return Machine(
        name=name,
        ranks_per_node=ranks_per_node,
        memory=Assumption(
            value=memory * (1 - FREE_SHARE),
            source=f"{'given' if memory_gib else sheet}, less {FREE_SHARE:.0%} for context, "
            "libraries and fragmentation (assumed)",
        ),
        flops=Assumption(value=tflops * 1e12, source="given")
        if tflops
        else Assumption(value=peak * COMPUTE_SHARE, source=f"{COMPUTE_SHARE:.0%} of peak, assumed"),
        peak_flops=Assumption(value=peak, source=f"{sheet}, {precision}"),
        memory_bandwidth=Assumption(value=gpu.memory_bandwidth, source=sheet),
        link_bandwidth=Assumption(
            value=gpu.link_bandwidth * LINK_SHARE, source=f"{LINK_SHARE:.0%} (assumed) of {sheet}"
        ),
        network_bandwidth=Assumption(
            value=gbps / 8 * 1e9 * LINK_SHARE,
            source=f"{LINK_SHARE:.0%} (assumed) of {gbps:g} Gbit/s a GPU, "
            + ("given" if network_gbps else "assumed"),
        ),
        host_bandwidth=Assumption(value=25e9, source="PCIe 4 x16, assumed"),
        latency=Assumption(value=30e-6, source="assumed"),
        hop=Assumption(value=3e-6, source="assumed"),
        launch=Assumption(value=1.2e-3, source="200 kernels of 6 us, assumed"),
    )


def cpu_machine(
    *,
    precision: str,
    ranks_per_node: int,
    network_gbps: float | None = None,
    memory_gib: float | None = None,
    tflops: float | None = None,
) -> Machine:
    """Describe this machine's processor, whose matrix products are timed. Arguments as above."""
    threads = max(1, (os.cpu_count() or 1) // ranks_per_node)
    with exact_onednn_matmul():  # as a step multiplies
        rate = measure_gemm_rate(precision, threads)
    measured = f"matrix products of {threads} thread(s) here, measured"
    total = memory_gib or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gbps = network_gbps or 10.0
    return Machine(
        name="cpu",
        ranks_per_node=ranks_per_node,
        memory=Assumption(
            value=total * 2**30 / ranks_per_node * (1 - FREE_SHARE),
            source=f"{'given' if memory_gib else 'this machine'}, shared by {ranks_per_node} "
            f"rank(s), less {FREE_SHARE:.0%} (assumed)",
        ),
        flops=Assumption(value=tflops * 1e12, source="given")
        if tflops
        else Assumption(value=0.75 * rate, source=f"75 % (assumed) of {measured}"),
        peak_flops=Assumption(value=rate, source=measured),
        memory_bandwidth=Assumption(value=10e9 * threads, source="10 GB/s a core, assumed"),
        link_bandwidth=Assumption(value=2e9, source="gloo within a machine, assumed"),
        network_bandwidth=Assumption(
            value=gbps / 8 * 1e9 * LINK_SHARE / ranks_per_node,
            source=f"{LINK_SHARE:.0%} (assumed) of {gbps:g} Gbit/s a machine, "
            + ("given" if network_gbps else "assumed"),
        ),
        host_bandwidth=Assumption(value=10e9, source="a copy in memory, assumed"),
        latency=Assumption(value=300e-6, source="assumed"),
        hop=Assumption(value=50e-6, source="assumed"),
        launch=Assumption(value=1e-3, source="assumed"),
        is_gpu=False,
    )
