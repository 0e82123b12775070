"""What is trained in which stage of decoupled training (Time Tracker, arXiv 2505.15151)."""

from __future__ import annotations

from tsmoe.models.time_tracker import TimeTracker
from tsmoe.nn.attention import AnyVariateAttention


def prepare_pretraining(model: TimeTracker) -> None:
    """Rest what channel-independent pretraining cannot teach: the biases between variates.

    With one variate a bias of its own is a constant that softmax cancels, and there is no other.
    Left trainable they would have no gradient, which every gradient exchange would wait for.
    """
    for module in model.modules():
        if isinstance(module, AnyVariateAttention):
            module.same_variate_bias_H.requires_grad_(False)
            module.other_variate_bias_H.requires_grad_(False)
