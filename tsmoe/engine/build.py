"""Build model and engine for the ranks at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.engine.plain_engine import PlainEngine, PlainEngineConfig, Precision
from tsmoe.engine.protocol import Engine
from tsmoe.errors import ConfigError
from tsmoe.host_memory import keep_freed_memory
from tsmoe.models import Model, ModelConfig, build_model
from tsmoe.models.compiled import compile_blocks
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.ranks import Ranks


class TrainingSettings(Protocol):
    """The training settings that an engine needs."""

    @property
    def micro_batch_size(self) -> int: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def recomputes_activations(self) -> bool: ...
    @property
    def compiles_blocks(self) -> bool: ...
    @property
    def timeout_seconds(self) -> float: ...

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Passes of each rank per optimizer step."""
        ...


class RunSettings(Protocol):
    """The parts of a run's configuration that an engine is built from."""

    @property
    def seed(self) -> int: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def engine(self) -> PlainEngineConfig | DeepSpeedEngineConfig: ...

    def expert_parallel_size(self, world_size: int) -> int:
        """Ranks that share one set of experts."""
        ...


def build_engine(config: RunSettings, ranks: Ranks, *, prepare: Callable[[Any], None]) -> Engine:
    """Build the model with this rank's experts and hand it to the engine. Collective.

    On CPU the process keeps memory that was freed from here on, see `keep_freed_memory`.

    Args:
        config: of the run.
        ranks: all ranks of the run.
        prepare: what a stage of training does to the model before the engine sees it.
    """
    training = config.training
    if ranks.device.type == "cpu":
        keep_freed_memory()
    make_model = functools.partial(
        build_model,
        config.model,
        seed=config.seed,
        recomputes_activations=training.recomputes_activations,
    )

    def finish(model: Model) -> None:
        prepare(model)
        if training.compiles_blocks:
            if not isinstance(model, TimeTracker):
                raise ConfigError(
                    f"training.compiles_blocks is true, but the blocks of {config.model.type} run "
                    "as they are; set it to false"
                )
            compile_blocks(model, device=ranks.device)

    match config.engine:
        case PlainEngineConfig():
            model = make_model()
            finish(model)
            return PlainEngine(model, config.optimizer, precision=training.precision, ranks=ranks)
        case DeepSpeedEngineConfig():
            from tsmoe.engine.deepspeed_engine import (
                DeepSpeedEngine,
                expert_factory,
                initialise_deepspeed,
            )

            size = config.expert_parallel_size(ranks.size)
            initialise_deepspeed(ranks, timeout_seconds=training.timeout_seconds)
            factory = expert_factory(
                size,
                ranks,
                zero_stage=config.engine.zero_stage,
                wire_precision=config.engine.wire_precision,
            )
            model = make_model(make_experts=factory)
            finish(model)
            return DeepSpeedEngine(
                model,
                config.engine,
                config.optimizer,
                precision=training.precision,
                micro_batch_size=training.micro_batch_size,
                gradient_accumulation_steps=training.gradient_accumulation_steps(ranks.size),
                ranks=ranks,
            )
