"""What a supervised run is determined by: a model, its tasks and their data."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn

from tsmoe.config import Section, decode, merge_layers, parse_override
from tsmoe.engine import EngineConfig, PlainEngineConfig
from tsmoe.engine.optimizer import OptimizerConfig
from tsmoe.errors import ConfigError
from tsmoe.finetune.config import KeptCheckpointsConfig
from tsmoe.finetune.guard import PatienceConfig
from tsmoe.heads.task import Pooling, Shortcut, TaskHeadConfig
from tsmoe.models.patch_moe import PatchMoEConfig
from tsmoe.moe.balance_loss import BalanceLossConfig
from tsmoe.train.run_config import LoopConfig, check_batches, ranks_that_share_experts
from tsmoe.train.schedule import BalanceConfig, ScheduleConfig

PointLoss = Literal["mse", "mae"]


def check_forecast(prediction_length: int, head_dropout: float, season: int | None) -> None:
    """Refuse lengths below 1."""
    if prediction_length < 1 or (season is not None and season < 1):
        raise ValueError(
            f"prediction_length ({prediction_length}) and season ({season}) must be at least 1"
        )
    check_dropout(head_dropout)


def check_dropout(head_dropout: float) -> None:
    """Refuse a share that is none."""
    if not 0 <= head_dropout < 1:
        raise ValueError(f"head_dropout ({head_dropout}) must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ForecastTaskConfig(Section):
    """Forecast the variates of a table."""

    type: Literal["forecast"] = "forecast"
    path: str | None = None
    """Table with one row per time; null: the run's `data`."""
    prediction_length: int = 96
    """Steps to forecast."""
    loss: PointLoss = "mse"
    head_dropout: float = 0.0
    """On the tokens that the head sees, while training."""
    shortcut: Shortcut | None = None
    """Add a linear map of the window, which begins as its mean or its last value and learns, or is
    least squares over the training windows and rests (ours)."""
    is_univariate: bool = False
    """Every variate makes windows of its own, so that balance is asked of all of them together."""
    columns: list[str] | None = None
    """Variates of the table; null: all."""
    time_column: str | None = None
    ignores_time: bool = False
    """Take rows as they stand, whatever their timestamps."""
    split: tuple[float, float, float] | None = None
    """Shares of train, validation and test; null: the usual borders of the table."""
    season: int | None = None
    """Rows in a season, for baselines; null: the usual one of the interval."""

    def __post_init__(self) -> None:
        check_forecast(self.prediction_length, self.head_dropout, self.season)


@dataclass(frozen=True, kw_only=True)
class SeriesTaskConfig(Section):
    """Forecast many univariate series, each with a test part of its own."""

    type: Literal["series"] = "series"
    path: str | None = None
    """Parquet with one series per row (`item_id`, `target`); null: the run's `data`."""
    test_path: str | None = None
    """What follows each series; null: its last points are kept for that."""
    prediction_length: int = 48
    """Steps to forecast."""
    loss: PointLoss = "mae"
    head_dropout: float = 0.0
    """On the tokens that the head sees, while training."""
    shortcut: Shortcut | None = None
    """Add a linear map of the window, which begins as its mean or its last value and learns, or is
    least squares over the training windows and rests (ours)."""
    season: int | None = None
    """Points in a season, for errors and baselines; null: that of the interval, 1 for weeks (as in
    the M4 competition)."""

    def __post_init__(self) -> None:
        check_forecast(self.prediction_length, self.head_dropout, self.season)


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Section):
    """Which points are hidden to be imputed."""

    shares: tuple[float, ...] = (0.125, 0.25, 0.375, 0.5)
    """Shares of the points of a window that are hidden; one is drawn for each window in training,
    the test part is imputed with each."""
    kinds: tuple[Literal["points", "blocks"], ...] = ("points",)
    """`points`: each by itself; `blocks`: stretches of `block_length`, of a variate each."""
    block_length: int = 12

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise ValueError(
                f"shares {list(self.shares)} must lie between 0 and 1: with none hidden there is "
                "nothing to learn, with all nothing to learn from"
            )
        if not self.kinds or self.block_length < 1:
            raise ValueError(
                f"kinds {list(self.kinds)} must name points or blocks, block_length "
                f"({self.block_length}) must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class ImputationTaskConfig(Section):
    """Fill what is hidden of the windows of a table."""

    type: Literal["imputation"] = "imputation"
    path: str | None = None
    loss: PointLoss = "mse"
    mask: MaskConfig = field(default_factory=MaskConfig)
    columns: list[str] | None = None
    time_column: str | None = None
    ignores_time: bool = False
    split: tuple[float, float, float] | None = None
    """Shares of train, validation and test; null: the usual borders of the table."""


@dataclass(frozen=True, kw_only=True)
class AnomalyTaskConfig(Section):
    """Find what a model of the usual cannot reconstruct."""

    type: Literal["anomaly"] = "anomaly"
    path: str | None = None
    """Table with a column of labels, and where there are several an entity and a split column."""
    entity_column: str | None = None
    """Null: `entity` or `series` where there is one; the same for the columns below."""
    label_column: str | None = None
    split_column: str | None = None
    time_column: str | None = None
    train_share: float | None = None
    """Of each entity's rows, where there is no split column; null: 0.15."""
    leaves_out_labelled: bool = False
    """Let points of the train part that are labelled as anomalies count as not recorded; otherwise
    such a train part is refused."""
    validation_share: float = 0.2
    """Last part of the train part, for early stopping and the threshold."""
    hidden_share: float = 0.0
    """Share of the patches that are hidden while training; each is then reconstructed from others,
    in scoring too. 0: every patch is reconstructed from itself and others (the paper's)."""
    flagged_share: float = 0.01
    """Share of the validation part that the threshold lets be flagged."""
    loss: PointLoss = "mse"

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1 or not 0 < self.flagged_share < 1:
            raise ValueError(
                f"validation_share ({self.validation_share}) and flagged_share "
                f"({self.flagged_share}) must lie between 0 and 1"
            )
        if not 0 <= self.hidden_share <= 0.5:
            raise ValueError(
                f"hidden_share ({self.hidden_share}) must be at least 0 and at most 0.5: patches "
                "are scored in turns, each from at least as many others"
            )


@dataclass(frozen=True, kw_only=True)
class ClassificationTaskConfig(Section):
    """Tell cases apart."""

    type: Literal["classification"] = "classification"
    path: str | None = None
    """Parquet with `split`, `label` and `dims`, a list of channels."""
    validation_share: float = 0.2
    """Of the training cases of each class, for early stopping."""
    fits_context: bool = True
    """Set `model.context_length` to the longest training case; the ends of longer ones are seen."""
    pooling: Pooling = "flatten"
    """What the head sees: all tokens side by side, or their mean and maximum (`mean_max`)."""
    head_dropout: float = 0.1
    """On what the head sees, while training."""

    def __post_init__(self) -> None:
        check_dropout(self.head_dropout)
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share ({self.validation_share}) must lie between 0 and 1")


TaskConfig = (
    ForecastTaskConfig
    | SeriesTaskConfig
    | ImputationTaskConfig
    | AnomalyTaskConfig
    | ClassificationTaskConfig
)


@dataclass(frozen=True, kw_only=True)
class TaskTrainingConfig(LoopConfig):
    """Sizes and cadence; a window has all variates. Where tasks are several, steps take turns."""

    global_batch_size: int = 32
    micro_batch_size: int = 32
    validate_every_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_roll_back()


@dataclass(frozen=True, kw_only=True)
class TaskRunConfig(Section):
    """Everything that a supervised run is determined by."""

    run: str
    """Folder of the run."""
    data: str | None = None
    """File of all tasks that name none themselves."""
    seed: int = 0
    model: PatchMoEConfig = field(default_factory=PatchMoEConfig)
    tasks: dict[str, TaskConfig]
    """By name; a model may serve several."""
    balance_loss: BalanceLossConfig = field(default_factory=BalanceLossConfig)
    training: TaskTrainingConfig = field(default_factory=TaskTrainingConfig)
    stopping: PatienceConfig = field(default_factory=PatienceConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-4))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    balance: BalanceConfig = field(default_factory=lambda: BalanceConfig(rate=0.0))
    """Of the load bias, which rests: a loss balances experts here."""
    checkpoint: KeptCheckpointsConfig = field(default_factory=KeptCheckpointsConfig)
    engine: EngineConfig = field(default_factory=PlainEngineConfig)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed ({self.seed}) must be at least 0")
        if not self.tasks:
            raise ValueError(
                "tasks is empty; name at least one, such as tasks.forecast.type=forecast"
            )
        if self.model.heads:
            raise ValueError(
                f"model.heads names {', '.join(self.model.heads)}; heads follow from tasks, leave "
                "them out"
            )
        for name, task in self.tasks.items():
            # Names are parts of parameters' names, where `expert` has a meaning.
            is_taken = hasattr(nn.ModuleDict, name) or name == "training" or "expert" in name
            if not re.fullmatch("[a-z][a-z0-9_]*", name) or is_taken:
                raise ValueError(
                    f"tasks: {name!r} can be no name; use small letters, digits and _, no word of "
                    "torch's modules such as type or train, and nothing with expert"
                )
            if task.path is None and self.data is None:
                raise ValueError(f"no file is given for task {name}; add data=FILE")
        if self.model.has_task_embedding and len(self.tasks) == 1:
            raise ValueError(
                "model.has_task_embedding is true, but there is one task; leave it out"
            )
        if (
            self.balance_loss.is_on
            and getattr(getattr(self.model.feed_forward, "router", None), "type", None)
            == "sequence"
        ):
            raise ValueError(
                "balance_loss needs a router that scores by softmax, but "
                "model.feed_forward.router.type is sequence; use linear or recurrent, or set "
                "balance_loss.alpha and balance_loss.beta to 0"
            )

    def path_of(self, name: str) -> str:
        """Return the file of a task."""
        path = self.tasks[name].path or self.data
        assert path is not None, "checked above"
        return path


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """A configuration and the model that its tasks ask for: what engines are built from."""

    config: TaskRunConfig
    model: PatchMoEConfig

    @classmethod
    def of(
        cls, config: TaskRunConfig, heads: dict[str, TaskHeadConfig], context_length: int
    ) -> TaskRun:
        """Give the model its heads.

        Raises:
            ConfigError: if the model can't be that long.
        """
        try:
            model = replace(config.model, heads=heads, context_length=context_length)
        except ValueError as error:
            raise ConfigError(f"model: {error}") from error
        return cls(config=config, model=model)

    @property
    def run(self) -> str:
        """Folder of the run."""
        return self.config.run

    @property
    def seed(self) -> int:
        """Of weights, of the order of windows and of what is hidden."""
        return self.config.seed

    @property
    def training(self) -> TaskTrainingConfig:
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


def resolve_tasks(preset: dict[str, object], origin: str, overrides: list[str]) -> TaskRunConfig:
    """Put a preset with tasks and `key=value` settings together.

    Raises:
        ConfigError: one line that names the keys.
    """
    layers = [parse_override(text) for text in overrides]
    # Among themselves first: a type drops what the preset gave, not what was typed before it.
    values = merge_layers(preset, merge_layers(*layers))
    if isinstance(values.get("model"), str):
        raise ConfigError(
            f"model={values['model']}: {origin} trains from scratch, on its tasks; leave model= "
            "out, or use a preset that fine-tunes a package"
        )
    return decode(TaskRunConfig, values, origin=origin)
