"""What a job costs before it is started: operations, memory, communication and time."""

from tsmoe.cost.flops import FlopCount, encoder_flops, training_flops
from tsmoe.cost.hardware import measure_gemm_rate, peak_flops

__all__ = ["FlopCount", "encoder_flops", "measure_gemm_rate", "peak_flops", "training_flops"]
