"""The engine without DeepSpeed: one process, or plain data parallel, by accelerate.

It is the twin that the DeepSpeed engine is tested against. Accelerate brings device, precision and
data parallelism; its DeepSpeed plug-in is not used: on CPU it sees one process on every rank.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from tsmoe.batch import WindowBatch
from tsmoe.checkpoint.elastic import (
    ParameterState,
    Snapshot,
    StateReader,
    restore,
    take_snapshot,
)
from tsmoe.config import Section
from tsmoe.engine.optimizer import OptimizerConfig, parameter_groups, set_learning_rate
from tsmoe.engine.protocol import UpdateReport
from tsmoe.errors import ConfigError
from tsmoe.models import Model
from tsmoe.ranks import Ranks

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class PlainEngineConfig(Section):
    """One process, or data parallel with a whole model on each rank."""

    type: Literal["plain"] = "plain"


class PlainEngine:
    """Trains on one process or data parallel; experts are never spread over ranks."""

    def __init__(
        self,
        model: Model,
        optimizer_config: OptimizerConfig,
        *,
        precision: Precision,
        ranks: Ranks,
    ) -> None:
        """Wrap the model. Collective.

        Raises:
            ConfigError: if accelerate sees other processes than the launcher started.
        """
        self.model = model
        self.ranks = ranks
        self._clip = optimizer_config.clip_grad_norm
        self._accelerator = Accelerator(
            cpu=ranks.device.type == "cpu",
            mixed_precision="bf16" if precision == "bf16" else "no",
            # Load biases are equal on all ranks already.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if self._accelerator.num_processes != ranks.size:
            # Accelerate decides by environment variables of its own; training on would be silent
            # nonsense: every rank alone, on the same data.
            raise ConfigError(
                f"accelerate sees {self._accelerator.num_processes} process(es), the launcher "
                f"started {ranks.size}; unset ACCELERATE_* variables or use engine.type=deepspeed"
            )
        optimizer = torch.optim.AdamW(
            parameter_groups(model, optimizer_config),
            lr=optimizer_config.lr,
            betas=optimizer_config.betas,
            eps=optimizer_config.eps,
            fused=True,
        )
        self._wrapped, self._prepared_optimizer = self._accelerator.prepare(model, optimizer)
        self._optimizer = optimizer

    def forward(self, batch: WindowBatch, *, last_micro_batch: bool) -> Any:
        """Run the model on the context of the batch's windows.

        It is in the forward pass that torch's DDP decides whether the backward pass will exchange.
        """
        with nullcontext() if last_micro_batch else self._accelerator.no_sync(self._wrapped):
            return self._wrapped(**self.model.arguments(batch))

    def backward(self, loss: Tensor, *, last_micro_batch: bool) -> None:
        """Add gradients; ranks exchange them with the last micro-batch only."""
        with nullcontext() if last_micro_batch else self._accelerator.no_sync(self._wrapped):
            self._accelerator.backward(loss)

    def update(self, *, lr: float) -> UpdateReport:
        """Clip and step, unless the gradient is not finite."""
        set_learning_rate(self._optimizer.param_groups, lr)
        norm = self._accelerator.clip_grad_norm_(self._wrapped.parameters(), self._clip)
        grad_norm = float(norm)
        if math.isfinite(grad_norm):
            self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad(set_to_none=True)
        return UpdateReport(grad_norm=grad_norm)

    def discard(self) -> None:
        """Forget the gradients of a step."""
        self._prepared_optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> Snapshot:
        """Copy the training state to host memory; the first rank holds all of it."""
        return take_snapshot(self.model, self._get_state, self.ranks)

    def restore(self, reader: StateReader, *, step: int) -> None:
        """Set weights, moments and buffers from a checkpoint."""

        def set_state(parameter: nn.Parameter, state: ParameterState) -> None:
            parameter.data.copy_(state.value)
            if parameter.requires_grad:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=parameter.device),
                    "exp_avg": state.exp_avg.to(parameter.device),
                    "exp_avg_sq": state.exp_avg_sq.to(parameter.device),
                }

        restore(self.model, reader, set_state)

    def _get_state(self, parameter: nn.Parameter) -> ParameterState:
        moments = self._optimizer.state.get(parameter, {})
        zero = torch.zeros_like(parameter)
        return ParameterState(
            value=parameter.data,
            exp_avg=moments.get("exp_avg", zero),
            exp_avg_sq=moments.get("exp_avg_sq", zero),
        )
