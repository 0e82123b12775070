"""How fast a run computes, against what its machine can: FLOP/s and MFU.

Operations are those of the model (`tsmoe.cost.flops`): routed experts count for the tokens that
reach them, `top_k` for each; recomputed activations do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tsmoe.cost import encoder_flops, measure_gemm_rate, peak_flops, training_flops
from tsmoe.models import ModelConfig
from tsmoe.models.patch_moe import PatchMoEConfig
from tsmoe.nn.matmul import exact_onednn_matmul
from tsmoe.nn.patch import num_patches
from tsmoe.ranks import Ranks
from tsmoe.train.step import StepReport


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What the ranks together could compute."""

    flops_per_second: float | None
    """None where it is not known; then there is no MFU."""
    source: str
    """Where the number is from."""


def find_peak(ranks: Ranks, precision: str) -> Peak:
    """Look the GPU up, or measure this processor with the threads of this rank.

    On CPU it takes a moment of computing: call it on one rank, before the first step. All ranks
    count alike.
    """
    if ranks.device.type == "cuda":
        name = torch.cuda.get_device_name(ranks.device)
        rate = peak_flops(name, precision)
        source = f"data sheet of {name}, {precision}"
    else:
        threads = torch.get_num_threads()
        with exact_onednn_matmul():  # as the step itself multiplies
            rate = measure_gemm_rate(precision, threads, rounds=3)
        source = f"{precision} matrix product of size 1024 on {threads} thread(s), measured"
    return Peak(flops_per_second=rate and rate * ranks.size, source=source)


def step_flops(model: ModelConfig, report: StepReport) -> float:
    """Count the operations of a step over all ranks.

    Of packed windows the fill counts as computed, but for the routed experts, which it does not
    reach; attention counts as that of whole windows.
    """
    if isinstance(model, PatchMoEConfig):
        return encoder_flops(model, sequences=report.num_sequences).total
    flops = training_flops(model, windows=1)
    patches = num_patches(
        model.context_length, patch_length=model.patch_length, patch_stride=model.patch_stride
    )
    everywhere = (flops.total - flops.routed_experts) * report.num_sequences
    return everywhere + flops.routed_experts * report.num_tokens / patches


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Speed of a step, of all ranks together, by the first rank's clock."""

    step_seconds: float
    points_per_second: float
    """Recorded points that were forecast."""
    tokens_per_second: float
    flops_per_second: float | None
    """None where part of the weights rest: their gradients are not computed, nor counted."""
    mfu: float | None
    """Share of the peak; None where the peak is not known."""
    data_wait_share: float
    """Part of the step that the first rank waited for data."""

    def as_metrics(self) -> dict[str, Any]:
        """Return the values by the names that metrics carry."""
        return {f"speed/{name}": value for name, value in vars(self).items()}


def throughput(
    model: ModelConfig,
    report: StepReport,
    peak: Peak,
    *,
    seconds: float,
    seconds_waited: float,
    counts_flops: bool = True,
) -> Throughput:
    """Divide what a step did by the time that it took."""
    flops_per_second = step_flops(model, report) / seconds if counts_flops else None
    mfu = None
    if flops_per_second is not None and peak.flops_per_second is not None:
        mfu = flops_per_second / peak.flops_per_second
    return Throughput(
        step_seconds=seconds,
        points_per_second=report.num_points / seconds,
        tokens_per_second=report.num_tokens / seconds,
        flops_per_second=flops_per_second,
        mfu=mfu,
        data_wait_share=seconds_waited / seconds,
    )
