"""Experts that DeepSpeed recognises as such, so that it reduces and clips their gradients rightly.

What DeepSpeed 0.19.8 reads: `isinstance(module, MoE)`, `num_experts`, `num_local_experts`,
`expert_group_name`, `set_deepspeed_parallelism()`, and on each parameter `allreduce = False` and
`group_name`. Its own layer's gate, capacity and einsum are not used.
"""

from __future__ import annotations

from typing import Any

from deepspeed.moe.layer import MoE
from torch import nn

from tsmoe.errors import ConfigError
from tsmoe.moe.experts import Experts
from tsmoe.ranks import Ranks


class DeepSpeedExperts(Experts, MoE):
    """This rank's share of a layer's experts.

    Holds experts and nothing else; parameter names are those of `Experts`, so that checkpoints and
    packages are the same with and without DeepSpeed.
    """

    def __init__(self, **settings: Any) -> None:
        # MoE.__init__ would build DeepSpeed's own gate and experts; nn.Module's comes with Experts.
        Experts.__init__(self, **settings)
        self.ep_size = self.ranks.size
        self.expert_group_name = f"ep_size_{self.ep_size}"
        self.enable_expert_tensor_parallelism = False
        self.use_residual = False
        for parameter in self.parameters(recurse=False):
            _mark(parameter, self.expert_group_name)

    # The groups were made in `expert_ranks`, before the weights; DeepSpeed asks for them again.
    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Refuse the one layout that the groups were not made for."""
        if use_data_before_expert_parallel_:
            raise ConfigError(
                "use_data_before_expert_parallelism is set in the DeepSpeed JSON, but ranks that "
                "share experts are consecutive here; remove it"
            )

    forward = Experts.forward


class SlicedExperts(Experts):
    """This rank's share of a layer's experts under stage 3, where `MoE` is refused.

    Stage 3 goes by what DeepSpeed writes on the parameters of its own AutoEP layers: a slice of
    each goes to every rank that holds the same experts, its gradient is averaged over all ranks,
    and its norm is summed over those that hold other experts. Layer, router and dispatch stay ours.
    """

    def __init__(self, **settings: Any) -> None:
        from deepspeed.utils import groups

        super().__init__(**settings)
        name = f"ep_size_{self.ranks.size}"
        for parameter in self.parameters(recurse=False):
            _mark(parameter, name)
            sliced: Any = parameter
            sliced.ds_zero_placement_family = "autoep_expert"
            sliced.ds_zero_partition_group_name = name
            sliced.ds_zero_partition_process_group = groups._get_expert_data_parallel_group(name)


def expert_ranks(world: Ranks, expert_parallel_size: int) -> Ranks:
    """Make DeepSpeed's expert groups and return the one of this rank. Collective."""
    from deepspeed.utils import groups

    name = f"ep_size_{expert_parallel_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(expert_parallel_size)
    return Ranks(
        rank=groups._get_expert_parallel_rank(name),
        size=expert_parallel_size,
        local_rank=world.local_rank,
        group=groups._get_expert_parallel_group(name),
        device=world.device,
        meter=world.meter,
    )


def rest_untrained_experts(model: nn.Module) -> None:
    """Have DeepSpeed pass over experts that are not trained, under stages 1 and 2.

    It insists on a group of expert parameters in the optimizer wherever it sees its `MoE`. Without
    one, its broadcast at the start must leave them alone too: other ranks hold other experts.
    """
    for module in model.modules():
        if isinstance(module, DeepSpeedExperts) and not any(
            parameter.requires_grad for parameter in module.parameters(recurse=False)
        ):
            module.__class__ = Experts  # type: ignore[assignment]
            for parameter in module.parameters(recurse=False):
                resting: Any = parameter
                del resting.allreduce
                resting.ds_optim_param = True


def _mark(parameter: nn.Parameter, group_name: str) -> None:
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = group_name  # type: ignore[attr-defined]
