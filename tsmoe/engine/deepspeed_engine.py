"""The DeepSpeed engine: ZeRO 1 or 2, experts in parallel, fp32 or bf16."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import (
    ParameterState,
    Snapshot,
    StateReader,
    restore,
    take_snapshot,
)
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig, deepspeed_json
from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups
from tsmoe.engine.plain_engine import Precision
from tsmoe.engine.protocol import UpdateReport
from tsmoe.errors import ConfigError
from tsmoe.models.output import ModelOutput
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import ExpertFactory
from tsmoe.ranks import Ranks

_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def expert_factory(expert_parallel_size: int, ranks: Ranks) -> ExpertFactory:
    """Return what builds this rank's share of a layer's experts. Collective: makes groups."""
    from tsmoe.engine.deepspeed_moe import DeepSpeedExperts, expert_ranks

    shared = expert_ranks(ranks, expert_parallel_size)
    return functools.partial(DeepSpeedExperts, ranks=shared)


class DeepSpeedEngine:
    """Trains under DeepSpeed; experts may be spread over ranks."""

    def __init__(
        self,
        model: TimeTracker,
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

        self.model = model
        self.ranks = ranks
        groups = parameter_groups(model, optimizer_config)
        if any(getattr(p, "allreduce", True) is False for p in model.parameters()):
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
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
        )
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

    def forward(self, batch: WindowBatch, *, last_micro_batch: bool) -> ModelOutput:  # noqa: ARG002
        """Run the model on the context of the batch's windows; DeepSpeed counts by itself."""
        length = self.model.config.context_length
        return self._engine(
            batch.values_BCL[..., :length],
            batch.observed_BCL[..., :length],
            series_BCN=batch.series_BCN,
        )

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add gradients; DeepSpeed counts micro-batches itself and exchanges with the last."""
        self._engine.backward(loss, scale_wrt_gas=False)
        if not last_micro_batch:
            self._engine.step()  # no update within an accumulation window; it only counts

    def update(self, *, lr: float) -> UpdateReport:
        """Clip and step; DeepSpeed skips the update if the gradient is not finite."""
        for group in self._zero.param_groups:
            group["lr"] = lr
        self._engine.step()
        return UpdateReport(grad_norm=float(self._engine.get_global_grad_norm()))

    def snapshot(self) -> Snapshot:
        """Assemble masters and moments from all ranks, one parameter at a time."""
        self._link_moments()
        return take_snapshot(self.model, self._get_state, self.ranks)

    def restore(self, reader: StateReader, *, step: int) -> None:
        """Set this rank's part of masters and moments, and all of the model."""
        for partition in self._zero.single_partition_of_fp32_groups:
            # Adam's state comes into being with the first step; it must exist to be set.
            self._zero.optimizer.state[partition] = {
                "step": torch.tensor(float(step), device=partition.device),
                **{moment: torch.zeros_like(partition) for moment in _MOMENTS},
            }
        self._link_moments()
        restore(self.model, reader, self._set_state)

    def _link_moments(self) -> None:
        # DeepSpeed 0.19.8 links moments to parameters after the first group has stepped and never
        # again, so those of later groups (experts always are one) would not be found.
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _get_state(self, parameter: nn.Parameter) -> ParameterState:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not parameter.requires_grad:
            zero = torch.zeros_like(parameter, dtype=torch.float32)
            return ParameterState(value=parameter.data.float(), exp_avg=zero, exp_avg_sq=zero)
        return ParameterState(
            value=safe_get_full_fp32_param(parameter),
            exp_avg=safe_get_full_optimizer_state(parameter, "exp_avg"),
            exp_avg_sq=safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        )

    def _set_state(self, parameter: nn.Parameter, state: ParameterState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(state.value)
        if not parameter.requires_grad:
            return
        device = parameter.device
        set_moment: Callable[..., None] = safe_set_full_optimizer_state
        safe_set_full_fp32_param(parameter, state.value.to(device))
        set_moment(parameter, state.exp_avg.to(device), "exp_avg")
        set_moment(parameter, state.exp_avg_sq.to(device), "exp_avg_sq")
