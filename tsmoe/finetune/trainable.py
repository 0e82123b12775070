"""Which weights learn in fine-tuning; the others rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from tsmoe.config import Section
from tsmoe.errors import ConfigError
from tsmoe.finetune.low_rank import LowRankConfig, insert_low_rank, is_low_rank
from tsmoe.models.time_tracker import TimeTracker
from tsmoe.moe.layer import MoELayer


@dataclass(frozen=True, kw_only=True)
class TrainableConfig(Section):
    """What learns. What is only of use where layers mix variates learns in any case, and so does a
    linear shortcut that is not fitted."""

    trains: Literal["all", "head", "experts", "low_rank"] = "all"
    """`head`: the head and the norm before it; `experts`: routed and shared experts; `low_rank`:
    small additions to attention and shared experts (LoRA, arXiv 2106.09685) and the head."""
    freezes_routers: bool = False
    """Leave routers as they are, so that tokens go to the experts they went to."""
    low_rank: LowRankConfig = field(default_factory=LowRankConfig)
    """Heeded where `trains` is low_rank."""

    @property
    def learns_all(self) -> bool:
        """Whether no weight rests, but for a shortcut that is fitted."""
        return self.trains == "all" and not self.freezes_routers


def prepare_finetuning(
    model: TimeTracker,
    config: TrainableConfig,
    *,
    seed: int = 0,
    shortcut_learns: bool = True,
) -> None:
    """Insert low-rank additions if wanted, and let learn what the config says.

    Raises:
        ConfigError: if the model has nothing of that kind.
    """
    if config.trains == "low_rank":
        insert_low_rank(model, config.low_rank, seed=seed)
    first_mixed = model.config.num_layers - model.config.num_channel_mixed_layers
    mixing = {
        f"blocks.{layer}.attention.{which}_variate_bias_H"
        for layer in range(first_mixed, model.config.num_layers)
        for which in ("same", "other")
    } | {"variate_graph.alpha_logit"}
    routers = tuple(
        f"{prefix}.router." for prefix, m in model.named_modules() if isinstance(m, MoELayer)
    )
    if config.trains == "experts" and not routers:
        raise ConfigError(
            "trainable.trains is experts, but the feed-forward network of the model is dense; "
            "use all, head or low_rank"
        )
    for name, parameter in model.named_parameters():
        if name.endswith("_variate_bias_H") or name in mixing:
            learns = name in mixing
        elif name.startswith("shortcut."):
            learns = shortcut_learns
        elif routers and name.startswith(routers) and config.freezes_routers:
            learns = False
        else:
            learns = _is_chosen(name, config.trains)
        parameter.requires_grad_(learns)


def _is_chosen(name: str, trains: str) -> bool:
    of_head = name.startswith(("head.", "output_norm."))
    match trains:
        case "head":
            return of_head
        case "experts":
            return ".feed_forward.experts." in name or ".feed_forward.always_on." in name
        case "low_rank":
            return of_head or is_low_rank(name)
        case _:
            return True


def count_trainable(model: nn.Module) -> int:
    """Count the parameters of this rank that learn."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
