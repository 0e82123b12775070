"""The models: a new one is a file here and a line in the union and the match."""

from typing import overload

from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import ExpertFactory

ModelConfig = TimeTrackerConfig | PatchMoEConfig
Model = TimeTracker | PatchMoE


@overload
def build_model(
    config: TimeTrackerConfig,
    *,
    seed: int = 0,
    make_experts: ExpertFactory = Experts,
    recomputes_activations: bool = False,
) -> TimeTracker: ...
@overload
def build_model(
    config: PatchMoEConfig,
    *,
    seed: int = 0,
    make_experts: ExpertFactory = Experts,
    recomputes_activations: bool = False,
) -> PatchMoE: ...
def build_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    make_experts: ExpertFactory = Experts,
    recomputes_activations: bool = False,
) -> Model:
    """Build the model that a config section describes."""
    match config:
        case TimeTrackerConfig():
            return TimeTracker(
                config,
                seed=seed,
                make_experts=make_experts,
                recomputes_activations=recomputes_activations,
            )
        case PatchMoEConfig():
            return PatchMoE(
                config,
                seed=seed,
                make_experts=make_experts,
                recomputes_activations=recomputes_activations,
            )
