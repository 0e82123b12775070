"""Expert layers as others have them, behind the interface of a feed-forward network.

All take tokens (..., D) and return as much; routed experts have our sizes and activation, so what
differs is how tokens come to experts and back. `active` below: what a token passes.

Shapes: T tokens, E experts, K experts per token, D model width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.models import build_model
from tsmoe.models.block import DenseConfig
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.layer import ExpertFactory, MoEConfig
from tsmoe.moe.routers import SequenceRouterConfig
from tsmoe.nn.feed_forward import SwiGLU

CAPACITY = 1.25
OURS = ("token", "prefix", "sequence")
LOOP = "loop, as Time-MoE"
STOCK = f"deepspeed 0.19.8, capacity {CAPACITY}"
STOCK_ALL = "deepspeed 0.19.8, nothing dropped"
# The last release that dispatches so; from 0.19.4 on rows are picked by index.
EINSUM = "einsum dispatch, as deepspeed 0.19.3"
AUTO_EP = "deepspeed 0.19.8 AutoEP"


class StockLayer(nn.Module):
    """DeepSpeed's own expert layer.

    With `drops` it leaves out what is beyond the capacity; without, every expert is padded to the
    fullest one.
    """

    def __init__(self, config: MoEConfig, d_model: int, ep_size: int, *, drops: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.stock = MoE(
            d_model,
            SwiGLU(d_model, config.d_ff_expert),
            num_experts=config.num_experts,
            ep_size=ep_size,
            k=config.router.top_k,
            capacity_factor=CAPACITY,
            drop_tokens=drops,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Route, and leave balance loss and counts aside."""
        return self.stock(tokens)[0]


class EinsumLayer(StockLayer):
    """The same gate and experts, with one-hot products for dispatch and combination.

    So DeepSpeed did up to release 0.19.3; masks of T x E x capacity make it quadratic in T.
    """

    def __init__(self, config: MoEConfig, d_model: int, ep_size: int) -> None:
        super().__init__(config, d_model, ep_size, drops=True)
        if ep_size > 1:
            raise ValueError(f"einsum dispatch is timed on one rank, not on {ep_size}")

    def forward(self, tokens: Tensor) -> Tensor:
        """Spread tokens by one-hot masks and gather by weighted ones."""
        layer = self.stock.deepspeed_moe
        tokens_TD = tokens.flatten(0, -2)
        _, combine_TEC, is_sent_TEC, _ = layer.gate(tokens_TD)
        sent_ECD = torch.einsum("tec,td->ecd", is_sent_TEC.to(tokens.dtype), tokens_TD)
        done_ECD = layer.experts(sent_ECD[None])[0]
        combined_TD = torch.einsum("tec,ecd->td", combine_TEC.to(tokens.dtype), done_ECD)
        return combined_TD.reshape(tokens.shape)


class LoopLayer(nn.Module):
    """A module for each expert, visited in turn: how Time-MoE and other open models do it.

    Ours to write, after the description of that way: gate, `torch.where` for the tokens of an
    expert, the expert, `index_add_` for its answers. Drops nothing; knows no other ranks.
    """

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.top_k = config.router.top_k
        self.gate = nn.Linear(d_model, config.num_experts, bias=False)
        self.networks = nn.ModuleList(
            _ThreeMatrices(d_model, config.d_ff_expert) for _ in range(config.num_experts)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Visit expert after expert."""
        tokens_TD = tokens.flatten(0, -2)
        scores_TE = F.softmax(self.gate(tokens_TD), dim=-1, dtype=torch.float32)
        weights_TK, expert_ids_TK = scores_TE.topk(self.top_k, dim=-1)
        weights_TK = weights_TK.to(tokens.dtype)
        is_chosen_EKT = F.one_hot(expert_ids_TK, len(self.networks)).permute(2, 1, 0)
        combined_TD = torch.zeros_like(tokens_TD)
        for is_chosen_KT, network in zip(is_chosen_EKT, self.networks, strict=True):
            choice, place = torch.where(is_chosen_KT)
            answers = network(tokens_TD[place]) * weights_TK[place, choice, None]
            combined_TD.index_add_(0, place, answers)
        return combined_TD.reshape(tokens.shape)


class _ThreeMatrices(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(rows)) * self.up(rows))


class AutoEPLayer(nn.Module):
    """What DeepSpeed's AutoEP looks for and puts its own layer in place of, in `initialize`."""

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        width, count = config.d_ff_expert, config.num_experts
        self.gate = nn.Linear(d_model, count, bias=False)
        self.experts = nn.Module()
        gate_up_proj = torch.randn(count, 2 * width, d_model) * d_model**-0.5
        down_proj = torch.randn(count, d_model, width) * width**-0.5
        self.experts.gate_up_proj = nn.Parameter(gate_up_proj)
        self.experts.down_proj = nn.Parameter(down_proj)


class AutoEPConfig:
    """The sizes of `AutoEPLayer`, under the names that AutoEP reads on a model."""

    model_type = None

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        self.num_local_experts = config.num_experts
        self.num_experts_per_tok = config.router.top_k
        self.hidden_size = d_model
        self.intermediate_size = config.d_ff_expert


def auto_ep_settings(ep_size: int, *, pattern: str) -> dict[str, Any]:
    """Return the part of the DeepSpeed JSON that turns AutoEP on, with torch's fused AdamW."""
    return {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True, "fused": True}},
        "expert_parallel": {
            "enabled": True,
            "autoep_size": ep_size,
            "preset_model": "mixtral",
            "moe_layer_pattern": pattern,
        },
    }


def twin_layer(variant: str, config: MoEConfig, d_model: int, ep_size: int = 1) -> nn.Module:
    """Build the routed part of a layer in the way of `variant`; not ours."""
    if variant == "dense":
        return SwiGLU(d_model, config.router.top_k * config.d_ff_expert)
    if variant == LOOP:
        return LoopLayer(config, d_model)
    if variant == AUTO_EP:
        return AutoEPLayer(config, d_model)
    if variant == EINSUM:
        return EinsumLayer(config, d_model, ep_size)
    return StockLayer(config, d_model, ep_size, drops=variant == STOCK)


class _WithShared(nn.Module):
    """A twin's routed experts beside the shared network that ours have too."""

    def __init__(self, routed: nn.Module, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.always_on = SwiGLU(d_model, config.num_shared_experts * config.d_ff_shared)
        self.routed = routed

    def forward(self, tokens: Tensor) -> Tensor:
        return self.always_on(tokens) + self.routed(tokens)


def twin_model(
    variant: str, config: TimeTrackerConfig, make_experts: ExpertFactory, ep_size: int
) -> TimeTracker:
    """Build the whole model in the way of `variant`: ours in a router mode, or a twin."""
    moe = config.feed_forward
    assert isinstance(moe, MoEConfig)
    if variant in OURS:
        router = SequenceRouterConfig(mode=variant, top_k=moe.router.top_k)  # type: ignore[arg-type]
        changed = replace(config, feed_forward=replace(moe, router=router))
        return build_model(changed, make_experts=make_experts)
    if variant == "dense":
        return build_model(replace(config, feed_forward=DenseConfig(d_ff=moe.active_d_ff)))
    model = build_model(replace(config, feed_forward=DenseConfig(d_ff=4)))
    for block in model.blocks:
        routed = twin_layer(variant, moe, config.d_model, ep_size)
        block.feed_forward = _WithShared(routed, moe, config.d_model)
    return model
