"""The models: a new one is a file here and a line in the union and the match."""

from typing import Any, overload

from tsmoe.config import decode, encode
from tsmoe.errors import ConfigError
from tsmoe.models.patch_moe import PatchMoE, PatchMoEConfig
from tsmoe.models.time_tracker import TimeTracker, TimeTrackerConfig
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import ExpertFactory

ModelConfig = TimeTrackerConfig | PatchMoEConfig
Model = TimeTracker | PatchMoE


def complete_model(section: dict[str, Any]) -> dict[str, Any]:
    """Add the settings that are younger than what an earlier program wrote of a model.

    What that was built with is their default. What is no section of a model is left as it is.
    """
    kind = PatchMoEConfig if section.get("type") == "patch_moe" else TimeTrackerConfig
    try:
        return encode(decode(kind, section, origin="checkpoint"))
    except ConfigError:
        return section


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
