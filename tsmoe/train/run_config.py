"""The whole configuration of a pretraining run, and how it is put together."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from tsmoe.checkpoint.saver import CheckpointConfig
from tsmoe.config import Section, decode, merge_layers, parse_override, read_yaml
from tsmoe.data.loader import DataConfig
from tsmoe.data.stream_source import StreamConfig
from tsmoe.engine import EngineConfig, PlainEngineConfig
from tsmoe.engine.deepspeed_config import DeepSpeedEngineConfig
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.engine.plain_engine import Precision
from tsmoe.errors import ConfigError
from tsmoe.losses import ErrorUnit
from tsmoe.models.block import FeedForwardConfig
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.moe.layer import MoEConfig
from tsmoe.train.not_finite import OnNotFinite
from tsmoe.train.schedule import BalanceConfig, ScheduleConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoopConfig(Section):
    """Sizes and cadence of a training loop."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    global_batch_size: int = 256
    """Windows of one optimizer step, over all ranks."""
    micro_batch_size: int = 64
    """Windows of one rank and one pass; the rest of the step is done by accumulation."""
    precision: Precision = "fp32"
    recomputes_activations: bool = False
    """Save memory by computing each block's activations again in the backward pass."""
    compiles_blocks: bool = False
    """Compile attention, norms and shared networks when training begins, by torch.compile. It takes
    a C++ compiler on CPU and pays in long runs (measured: benchmarks/compile.py)."""
    validate_every_steps: int = 100
    log_every_steps: int = 10
    """Steps between lines of the log and points of tensorboard; metrics.jsonl has every step."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    timeout_seconds: float = 600.0
    """A collective that waits longer than this for another rank fails; a step for its data a tenth
    earlier, so that the rank that waits for data says so before others wait for it in vain."""
    stop_seconds: float | None = None
    """Once a stop was asked for, a step that takes this long, and three times as long as any
    before, is stuck, and the process ends without saving; null: a thirtieth of timeout_seconds."""
    on_not_finite: OnNotFinite = "stop"
    """What follows a loss or gradient that is not finite: `stop`; `skip` the update of that step;
    or `roll_back` to the last checkpoint and go on with the windows after the bad ones."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size", "validate_every_steps",
                     "log_every_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.timeout_seconds <= 0 or (self.stop_seconds is not None and self.stop_seconds <= 0):
            raise ValueError(
                f"timeout_seconds ({self.timeout_seconds}) and stop_seconds ({self.stop_seconds}) "
                "must be above 0"
            )

    @property
    def stuck_seconds(self) -> float:
        """How long a step may last once a stop was asked for."""
        return self.timeout_seconds / 30 if self.stop_seconds is None else self.stop_seconds

    def refuse_roll_back(self) -> None:
        """Refuse it where a run keeps what was best instead.

        Raises:
            ValueError: naming the setting.
        """
        if self.on_not_finite == "roll_back":
            raise ValueError(
                "on_not_finite is roll_back, but a fine-tuning run ends at such a step and hands "
                "over what was best before; use stop or skip"
            )

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Passes of each rank per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * world_size)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LoopConfig):
    """The loop of models that predict the next patch."""

    error_unit: ErrorUnit = "window"
    """Errors are measured in the scale that the predicting `token` knows, or the `window`'s."""
    target_clip: float = 10.0
    """Normalised targets are clipped to this many scales in the loss."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_clip <= 0:
            raise ValueError(f"target_clip ({self.target_clip}) must be above 0")


# Settings of `data` that a stream heeds too; all others speak of a corpus.
_OF_A_STREAM = ("mixup_share", "num_workers", "max_validation_windows")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Everything that a pretraining run is determined by."""

    run: str
    """Folder of the run."""
    corpus: str | None = None
    """Folder or URL of the corpus, made by `tsmoe data build`."""
    stream: StreamConfig | None = None
    """Train on a data set of the hub as it comes, in place of a corpus. Given over a preset or file
    with a corpus it takes its place, and the other way round; both at once are refused."""
    seed: int = 0
    model: TimeTrackerConfig = field(default_factory=TimeTrackerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=PlainEngineConfig)

    def __post_init__(self) -> None:
        model = self.model
        if self.stream is not None:
            self._check_streamable()
        elif self.corpus is None:
            raise ValueError(
                "corpus is not set; give corpus=FOLDER, or stream.path=NAME to train on a data set "
                "of the hub as it comes"
            )
        is_stage_3 = getattr(self.engine, "zero_stage", None) == 3
        if self.training.compiles_blocks and is_stage_3:
            raise ValueError(
                "training.compiles_blocks is true and engine.zero_stage is 3, but there DeepSpeed "
                "gathers the weights of each module by hooks that torch.compile cannot trace; use "
                "stage 1 or 2, or leave blocks as they are"
            )
        if self.data.packs_short_series and model.context_length % model.patch_length:
            below = model.context_length // model.patch_length * model.patch_length
            raise ValueError(
                f"model.context_length ({model.context_length}) must be a multiple of "
                f"model.patch_length ({model.patch_length}) where data.packs_short_series is true; "
                f"nearest are {below} and {below + model.patch_length}"
            )

    def _check_streamable(self) -> None:
        """Refuse what a stream would not heed, as it cannot know all series ahead."""
        assert self.stream is not None
        if self.corpus is not None:
            raise ValueError(
                f"corpus is {self.corpus} and stream.path is {self.stream.path}; a run is trained "
                "on one of them: leave the other out, or set it to null"
            )
        for setting in fields(self.data):
            value = getattr(self.data, setting.name)
            if setting.name not in _OF_A_STREAM and value != getattr(DataConfig(), setting.name):
                raise ValueError(
                    f"data.{setting.name} is {value}, but stream is set, and that is for the "
                    "windows of a corpus; build one, or leave that out"
                )
        if self.data.num_workers > 1:
            raise ValueError(
                f"data.num_workers ({self.data.num_workers}) must be 0 or 1 where stream is set: "
                "one thread reads a stream ahead"
            )

    def check_world_size(self, world_size: int) -> None:
        """Check what depends on the number of ranks, before any data is opened.

        Raises:
            ConfigError: naming both fields and both values.
        """
        check_batches(self.training, world_size)
        self.expert_parallel_size(world_size)

    def expert_parallel_size(self, world_size: int) -> int:
        """Say how many ranks share one set of experts.

        Raises:
            ConfigError: if that many cannot, naming both fields and both values.
        """
        return ranks_that_share_experts(self.engine, self.model.feed_forward, world_size)


def check_batches(training: LoopConfig, world_size: int) -> None:
    """Check that all ranks can share the global batch equally.

    Raises:
        ConfigError: naming both fields, both values and what would fit.
    """
    per_pass = training.micro_batch_size * world_size
    if training.global_batch_size % per_pass:
        raise ConfigError(
            f"training.global_batch_size ({training.global_batch_size}) must be a multiple of "
            f"training.micro_batch_size ({training.micro_batch_size}) times the number of "
            f"ranks ({world_size}); {_fitting_sizes(training, world_size)}"
        )


def ranks_that_share_experts(
    engine: EngineConfig, feed_forward: FeedForwardConfig, world_size: int
) -> int:
    """Say how many ranks share one set of experts.

    Raises:
        ConfigError: if that many cannot, naming both fields and both values.
    """
    num_experts = feed_forward.num_experts if isinstance(feed_forward, MoEConfig) else 1
    if not isinstance(engine, DeepSpeedEngineConfig):
        return 1
    size = engine.expert_parallel_size
    if size == "auto":
        return math.gcd(world_size, num_experts)
    if world_size % size:
        raise ConfigError(
            f"engine.expert_parallel_size ({size}) must divide the number of ranks "
            f"({world_size}); start more ranks or set engine.expert_parallel_size=auto"
        )
    if not isinstance(feed_forward, MoEConfig) and size > 1:
        raise ConfigError(
            f"engine.expert_parallel_size is {size}, but model.feed_forward is dense; "
            "set engine.expert_parallel_size=auto"
        )
    if num_experts % size:
        raise ConfigError(
            f"engine.expert_parallel_size ({size}) must divide "
            f"model.feed_forward.num_experts ({num_experts})"
        )
    return size


def _fitting_sizes(training: LoopConfig, world_size: int) -> str:
    """Say which batch sizes would fit so many ranks."""
    windows, per_pass = training.global_batch_size, training.micro_batch_size * world_size
    nearest = max(1, round(windows / per_pass)) * per_pass
    advice = f"set training.global_batch_size={nearest}"
    if windows % world_size == 0:
        micro_batch_size = math.gcd(windows // world_size, training.micro_batch_size)
        advice += f", or keep it and set training.micro_batch_size={micro_batch_size}"
    return advice


PRETRAINING, FINE_TUNING = "presets", "presets/finetune"
"""Folders of presets in the product."""


def preset_names(folder: str = PRETRAINING) -> list[str]:
    """Names of the presets that come with the product."""
    entries = (resources.files("tsmoe") / folder).iterdir()
    return sorted(Path(entry.name).stem for entry in entries if entry.name.endswith(".yaml"))


def read_preset(name_or_path: str, folder: str = PRETRAINING) -> dict[str, Any]:
    """Read a preset by name, or a YAML file by path.

    Raises:
        ConfigError: if there is no such preset or file.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        return read_yaml(Path(name_or_path))
    if name_or_path not in (names := preset_names(folder)):
        other, command = (
            (PRETRAINING, "pretrain") if folder == FINE_TUNING else (FINE_TUNING, "finetune")
        )
        if name_or_path in preset_names(other):
            raise ConfigError(f"{name_or_path} is a preset of tsmoe {command}; use it there")
        raise ConfigError(
            f"{name_or_path!r} is no preset; there are {', '.join(names)}; a file must end in .yaml"
        )
    with resources.as_file(resources.files("tsmoe") / folder / f"{name_or_path}.yaml") as path:
        return read_yaml(path)


def resolve(name_or_path: str, overrides: list[str]) -> RunConfig:
    """Put preset or file and `key=value` settings together.

    Raises:
        ConfigError: one line that names the keys.
    """
    preset, given = read_preset(name_or_path), [parse_override(text) for text in overrides]
    for wanted, other in (("stream", "corpus"), ("corpus", "stream")):
        # As with the variants of a section: what belongs to the other one goes.
        is_given = {key: merge_layers(*given).get(key) is not None for key in (wanted, other)}
        if is_given[wanted] and not is_given[other] and preset.get(other) is not None:
            logger.info("%s is given: %s of %s is left out", wanted, other, name_or_path)
            preset = preset | {other: None}
    return decode(RunConfig, merge_layers(preset, merge_layers(*given)), origin=name_or_path)
