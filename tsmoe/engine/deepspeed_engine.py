"""The DeepSpeed engine: ZeRO 1, 2 or 3, experts in parallel, fp32 or bf16."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import Snapshot, StateReader, restore, take_snapshot
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig, deepspeed_json
from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups, set_learning_rate
from tsmoe.engine.plain_engine import Precision
from tsmoe.engine.protocol import UpdateReport
from tsmoe.engine.zero_state import GroupedState, SlicedState, ZeroState
from tsmoe.errors import ConfigError
from tsmoe.models import Model
from tsmoe.moe.layer import ExpertFactory, MoELayer
from tsmoe.ranks import Ranks


def initialise_deepspeed(ranks: Ranks, *, timeout_seconds: float) -> None:
    """Set DeepSpeed up over the ranks that have joined already. Collective.

    Two cures for DeepSpeed 0.19.8 are applied first:
    - on CPU it would compile a shared-memory operator for minutes (and fail without a compiler),
      which only inference uses;
    - groups that it makes would drop the timeout, so that a lost rank hangs the others for 30
      minutes.
    """
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed asks for it even where one process was started without a launcher.
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))
    import deepspeed
    import deepspeed.ops
    from deepspeed.comm.torch import TorchBackend

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}

    def new_group(_: Any, members: list[int]) -> Any:
        return torch.distributed.new_group(members, timeout=timedelta(seconds=timeout_seconds))

    TorchBackend.new_group = new_group
    if not torch.distributed.is_initialized():
        # DeepSpeed wants a group even for one process.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo", store=store, rank=0, world_size=1
        )
    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
    )


def expert_factory(
    expert_parallel_size: int, ranks: Ranks, *, zero_stage: int, wire_precision: str = "same"
) -> ExpertFactory:
    """Return what builds this rank's share of a layer's experts. Collective: makes groups."""
    from tsmoe.engine.deepspeed_moe import DeepSpeedExperts, SlicedExperts, expert_ranks

    shared = expert_ranks(ranks, expert_parallel_size)
    if wire_precision == "bf16":
        shared = replace(shared, wire_dtype=torch.bfloat16)
    kind = SlicedExperts if zero_stage == 3 else DeepSpeedExperts
    return functools.partial(kind, ranks=shared)


class DeepSpeedEngine:
    """Trains under DeepSpeed; experts may be spread over ranks."""

    def __init__(
        self,
        model: Model,
        config: DeepSpeedEngineConfig,
        optimizer_config: OptimizerConfig,
        *,
        precision: Precision,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        ranks: Ranks,
    ) -> None:
        """Wrap a model whose experts were built by `expert_factory`. Collective."""
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        from tsmoe.engine.deepspeed_moe import rest_untrained_experts

        self.model = model
        self.ranks = ranks
        rest_untrained_experts(model)
        groups = parameter_groups(model, optimizer_config)
        # Stage 3 splits groups by itself, by the ranks that a parameter is spread over.
        has_marked = any(getattr(p, "allreduce", True) is False for p in model.parameters())
        if has_marked and config.zero_stage != 3:
            groups = split_params_into_different_moe_groups_for_optimizer(groups)
        # torch's AdamW, not one named in the JSON: on CPU that would compile for minutes.
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimizer_config.lr,
            betas=optimizer_config.betas,
            eps=optimizer_config.eps,
            fused=True,
        )
        settings = deepspeed_json(
            config,
            precision=precision,
            clip_grad_norm=optimizer_config.clip_grad_norm,
            is_on_gpu=ranks.device.type == "cuda",
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
        # DeepSpeed allocates all of its bucket, however small the model.
        zero, count = settings["zero_optimization"], sum(p.numel() for p in model.parameters())
        zero["reduce_bucket_size"] = min(int(zero["reduce_bucket_size"]), count)
        try:
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, dist_init_required=False, config=settings
            )
        except Exception as error:
            # What DeepSpeed raises for a setting that it refuses has no common type.
            if config.config_file is None:
                raise
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{config.config_file}: DeepSpeed refuses these settings: {reason}"
            ) from error

        self._state: ZeroState = GroupedState(self._zero)
        if config.zero_stage == 3:
            self._state = SlicedState(self._zero)
            _announce_router_parameters(model)
        else:
            # It would look at every gradient, exchange what it found and wait for the device; the
            # norm that follows says the same.
            self._zero.check_overflow = lambda **_: None

    def forward(self, batch: WindowBatch, *, last_micro_batch: bool) -> Any:
        """Run the model on the context of the batch's windows."""
        # DeepSpeed counts micro-batches itself, but tells its optimizer from a hook on the tensors
        # that the model returns, and sees none in a `ModelOutput`: left alone, the optimizer is one
        # micro-batch behind, and stage 3 with offload steps with the gradient of the last one only.
        self._engine.set_gradient_accumulation_boundary(last_micro_batch)
        return self._engine(**self.model.arguments(batch))

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add gradients; they are exchanged with the last, under stages 2 and 3 with each."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last_micro_batch:
            self._engine.step()  # no update within an accumulation window; it only counts

    def update(self, *, lr: float) -> UpdateReport:
        """Clip and step; DeepSpeed skips the update if the gradient is not finite."""
        set_learning_rate(self._zero.param_groups, lr)
        self._engine.step()
        return UpdateReport(grad_norm=float(self._engine.get_global_grad_norm()))

    def discard(self) -> None:
        """Forget the gradients of a step: DeepSpeed clears all it holds of them where it skips."""
        with self._state.gradient_taken_for_infinite():
            self._engine.step()

    def snapshot(self) -> Snapshot:
        """Assemble masters and moments from all ranks, one parameter at a time."""
        self._state.begin_reading()
        return take_snapshot(self.model, self._state.get, self.ranks)

    def restore(self, reader: StateReader, *, step: int) -> None:
        """Set this rank's part of masters and moments, and all of the model."""
        self._state.begin_writing(step)
        restore(self.model, reader, self._state.set, shape_of=self._state.shape_of)


def _announce_router_parameters(model: Model) -> None:
    """Have stage 3 gather a router's parameters in the backward pass with its layer.

    DeepSpeed gathers a module's parameters when a gradient arrives at a tensor that it returned; a
    router returns a `Routing`, in which DeepSpeed sees no tensor.
    """
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.router.parameters():
                register_external_parameter(layer, parameter)
