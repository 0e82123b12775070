"""What a fine-tuning run is determined by, and how it is put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tsmoe.config import Section, decode, merge_layers, parse_override
from tsmoe.engine import EngineConfig, PlainEngineConfig
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.errors import ConfigError
from tsmoe.finetune.guard import StoppingConfig
from tsmoe.finetune.trainable import TrainableConfig
from tsmoe.losses import ErrorUnit
from tsmoe.models.time_tracker import TimeTrackerConfig
from tsmoe.nn.variate_graph import VariateGraphConfig
from tsmoe.train.run_config import (
    FINE_TUNING,
    TrainingConfig,
    check_batches,
    ranks_that_share_experts,
    read_preset,
)
from tsmoe.train.schedule import BalanceConfig, ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TableConfig(Section):
    """The table to fit to, and what of it is forecast from what."""

    path: str
    """CSV or Parquet, one row per time."""
    time_column: str | None = None
    """Found by itself if not given."""
    ignores_time: bool = False
    """Take rows as they stand, whatever their timestamps."""
    targets: list[str] | None = None
    """Columns to forecast; null: all that are no covariates."""
    covariates: list[str] = field(default_factory=list)
    """Columns that help to forecast and are not forecast."""
    known_future: list[str] = field(default_factory=list)
    """Those covariates whose values are known for the steps to forecast, such as a calendar."""
    split: tuple[float, float, float] | None = None
    """Shares of train, validation and test; null: the usual borders of the table."""
    context_length: int | None = None
    """Rows that a forecast is made from; null: as many as the model's context."""
    prediction_length: int = 96
    """Rows to forecast."""
    few_shot: float = 1.0
    """Share of the training windows that is used, uniformly spaced; 1 for all."""
    season: int | None = None
    """Rows in a season, for the seasonal baseline; null: the usual one of the interval."""

    def __post_init__(self) -> None:
        if self.prediction_length < 1 or (self.context_length or 1) < 1:
            raise ValueError(
                f"prediction_length ({self.prediction_length}) and context_length "
                f"({self.context_length}) must be at least 1"
            )
        if self.season is not None and self.season < 1:
            raise ValueError(f"season ({self.season}) must be at least 1")
        if not 0 < self.few_shot <= 1:
            raise ValueError(f"few_shot ({self.few_shot}) must be above 0 and at most 1")
        named = [*(self.targets or ()), *self.covariates]
        if self.targets == [] or len(set(named)) < len(named):
            raise ValueError(
                f"targets ({self.targets}) and covariates ({self.covariates}) must name at least "
                "one target and no column twice"
            )
        if strangers := [name for name in self.known_future if name not in self.covariates]:
            raise ValueError(f"known_future names {strangers[0]!r}, which covariates does not")

    @property
    def covariates_in_order(self) -> list[str]:
        """Covariates as they stand behind the targets: those known in the future come last."""
        past = [name for name in self.covariates if name not in self.known_future]
        return [*past, *self.known_future]


@dataclass(frozen=True, kw_only=True)
class FinetuneTrainingConfig(TrainingConfig):
    """Sizes and cadence; a window has one variate, or all of them where layers mix them."""

    steps: int = 1000
    """Optimizer steps at most; an early stop ends sooner."""
    global_batch_size: int = 256
    micro_batch_size: int = 256
    error_unit: ErrorUnit = "values"
    """`values`: in the unit of the table, scaled by its train part, as errors are reported."""
    validate_every_steps: int = 50
    loss_on: Literal["all", "horizon"] = "all"
    """Points that are learned from: what follows `all` tokens, or the steps to forecast alone."""
    max_variates: int | None = None
    """Most target variates of a window in training, drawn anew each step, where layers mix them;
    null for all. Validation and test always see all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_roll_back()
        if self.max_variates is not None and self.max_variates < 1:
            raise ValueError(f"max_variates ({self.max_variates}) must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MixingConfig(Section):
    """Which layers let variates look at one another, and along which graph."""

    num_channel_mixed_layers: int = 0
    """Last layers that do; 0: every variate by itself."""
    graph: VariateGraphConfig = field(default_factory=VariateGraphConfig)

    def __post_init__(self) -> None:
        if self.num_channel_mixed_layers < 0:
            raise ValueError(
                f"num_channel_mixed_layers ({self.num_channel_mixed_layers}) must be at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class KeptCheckpointsConfig(Section):
    """A checkpoint follows each validation, and the best one stays."""

    keep: int = 2
    """Newest checkpoints that are kept beside the best one."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep ({self.keep}) must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Section):
    """Everything that a fine-tuning run is determined by."""

    run: str
    """Folder of the run."""
    start: str | None = None
    """Package, run folder or checkpoint that training starts from; null: from scratch."""
    model: TimeTrackerConfig | None = None
    """The model to train from scratch; null where `start` brings one."""
    table: TableConfig
    seed: int = 0
    dropout: float | None = None
    """While fine-tuning; null: as the start was trained."""
    linear_shortcut: Literal["learned", "least_squares"] | None = None
    """Add a linear map of the context to the forecast: it starts at zero and is `learned` with the
    rest; or it is the `least_squares` of what a share of the start's forecast misses in training
    windows, and rests, while the head begins at that share, which may be 0. null: as the start has
    it. Ours, see `LinearShortcut`."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    training: FinetuneTrainingConfig = field(default_factory=FinetuneTrainingConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-4))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(rate=0.0))
    """Ours: the load bias rests, as experts have found their work in pretraining."""
    checkpoint: KeptCheckpointsConfig = field(default_factory=KeptCheckpointsConfig)
    engine: EngineConfig = field(default_factory=PlainEngineConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must be at least 0")
        if (self.start is None) == (self.model is None):
            raise ValueError(
                "give start=PACKAGE to fine-tune what was pretrained, or a model section to train "
                f"from scratch, one of the two; start is {self.start}, model is "
                f"{'not set' if self.model is None else 'set'}"
            )
        if self.start is None and self.trainable.trains != "all":
            raise ValueError(
                f"trainable.trains is {self.trainable.trains}, but there is no start: weights that "
                "rest would stay random; use trainable.trains=all"
            )
        if self.table.covariates and not self.mixing.num_channel_mixed_layers:
            raise ValueError(
                "table.covariates are given, but mixing.num_channel_mixed_layers is 0, so no "
                "target could look at them; set it to 1 or more"
            )
        if self.training.max_variates is not None and not self.mixing.num_channel_mixed_layers:
            raise ValueError(
                "training.max_variates is for windows of many variates, but "
                "mixing.num_channel_mixed_layers is 0; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """A configuration and the model that its start brings: what engines are built from."""

    config: FinetuneConfig
    model: TimeTrackerConfig

    @property
    def run(self) -> str:
        """Folder of the run."""
        return self.config.run

    @property
    def seed(self) -> int:
        """Of weights from scratch and of the order of windows."""
        return self.config.seed

    @property
    def training(self) -> FinetuneTrainingConfig:
        """Sizes and cadence."""
        return self.config.training

    @property
    def optimizer(self) -> OptimizerConfig:
        """Of the optimizer."""
        return self.config.optimizer

    @property
    def engine(self) -> EngineConfig:
        """Of the engine."""
        return self.config.engine

    def expert_parallel_size(self, world_size: int) -> int:
        """Ranks that share one set of experts."""
        return ranks_that_share_experts(self.engine, self.model.feed_forward, world_size)

    def check_world_size(self, world_size: int) -> None:
        """Check what depends on the number of ranks.

        Raises:
            ConfigError: naming both fields and both values.
        """
        check_batches(self.training, world_size)
        self.expert_parallel_size(world_size)
        if self.training.compiles_blocks and getattr(self.engine, "zero_stage", None) == 3:
            raise ConfigError(
                "training.compiles_blocks is true and engine.zero_stage is 3, but there DeepSpeed "
                "gathers the weights of each module by hooks that torch.compile cannot trace; use "
                "stage 1 or 2, or leave blocks as they are"
            )


# Short forms of the settings that every run is given.
_SHORT = {"model": "start", "data": "table.path", "few_shot": "table.few_shot"}


def resolve_finetune(name_or_path: str, overrides: list[str]) -> FinetuneConfig:
    """Put preset or file and `key=value` settings together.

    `model=PACKAGE`, `data=TABLE` and `few_shot=SHARE` are short for start, table.path and
    table.few_shot.

    Raises:
        ConfigError: one line that names the keys.
    """
    preset = read_preset(name_or_path, FINE_TUNING)
    layers = [parse_override(_in_full(text)) for text in overrides]
    values = merge_layers(preset, merge_layers(*layers))
    if values.get("start") is not None and "model" in values and "model" not in preset:
        named = ", ".join(f"model.{key}" for key in values["model"])
        raise ConfigError(
            f"{named}: a package brings its own model, with its length of patches; leave this out, "
            "or train from scratch: tsmoe finetune from_scratch"
        )
    if "table" not in values:
        raise ConfigError("no table is given; add data=TABLE.csv (or .parquet)")
    if values.get("start") is None and values.get("model") is None:
        raise ConfigError(
            f"{name_or_path} needs what to start from; add model=PACKAGE (or a run folder), or use "
            "the preset from_scratch"
        )
    return decode(FinetuneConfig, values, origin=name_or_path)


def _in_full(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{_SHORT.get(key, key)}{equals}{value}"
