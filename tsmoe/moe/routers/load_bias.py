"""Balance without an auxiliary loss: a bias on the scores that only decides who is chosen.

Shapes: E routed experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoadBias(nn.Module):
    """Bias of each expert, raised while it is chosen less than the mean and lowered while more.

    A float32 buffer: saved with the model, never decayed, at rest in evaluation and fine-tuning.

    Source: Time Tracker (arXiv 2505.15151), Algorithm 1; loss-free balancing (arXiv 2408.15664).
    """

    bias_E: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

    @torch.no_grad()
    def update(self, load_E: Tensor, *, rate: float) -> None:
        """Apply `b_e += rate * sign(mean load - load_e)`.

        Every rank must call it after the optimizer step with the same loads: those of all
        micro-batches of all ranks. It communicates nothing.
        """
        # The mean over experts, not top_k * T / E: any unit of load will do.
        load_E = load_E.to(self.bias_E.device, torch.float64)
        self.bias_E += rate * torch.sign(load_E.mean() - load_E).to(self.bias_E.dtype)
