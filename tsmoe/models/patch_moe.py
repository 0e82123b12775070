"""PatchMoE: an encoder over patches with recurrently routed experts and a head for each task.

Shapes: B windows, C variates, L context points, N patches, P patch length, D model width, J tasks,
R width of the router's memory; 1 kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsmoe.batch import WindowBatch
from tsmoe.config import Section
from tsmoe.heads.task import ForecastHead, ReconstructionHead, TaskHeadConfig, build_task_head
from tsmoe.models.block import FeedForwardConfig
from tsmoe.models.encoder_block import EncoderBlock
from tsmoe.models.output import TaskOutput
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import ExpertFactory, MoEConfig, MoELayer
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routers import AnyRouter, RecurrentRouterConfig
from tsmoe.moe.routers.recurrent import share_memory
from tsmoe.moe.routing import RouterState, Routing
from tsmoe.nn.lines import fill_by_lines
from tsmoe.nn.patch import PatchEmbedding, cut_patches

# RevIN's own: keeps a nearly constant window from being blown up.
_EPSILON = 1e-5


def _recurrent_experts() -> MoEConfig:
    return MoEConfig(router=RecurrentRouterConfig())


@dataclass(frozen=True, kw_only=True)
class PatchMoEConfig(Section):
    """PatchMoE (arXiv 2509.22279). The paper states few sizes: the defaults are ours."""

    type: Literal["patch_moe"] = "patch_moe"
    patch_length: int = 24
    """Points in a patch; patches do not overlap."""
    context_length: int = 336
    """Points of a window. Where patches do not fit, the first one begins before the window, with
    points that count as not observed."""
    d_model: int = 128
    num_layers: int = 2
    num_heads: int = 8
    dropout: float = 0.1
    """On embeddings and on the outputs of attention and feed-forward, while training."""
    normalises_windows: bool = True
    """Take mean and deviation out of each window and put them back (RevIN, without its affine part,
    which would tie the model to the variates of one table). Ours: off for classification, where
    level and scale may tell classes apart."""
    fills_gaps: bool = False
    """Show a straight line where points are not observed, instead of the mean, and reconstruct what
    departs from it. Ours: between close neighbours a line is hard to beat, and hard to learn."""
    norms_first: bool = False
    """Norm what attention and experts see, not what they leave (the paper's Eq. 3). Ours: the head
    then sees how large the values of a patch are, which a norm would take away."""
    has_task_embedding: bool = False
    """Tell the router which task it serves, at the input of its GRU. Ours, beyond the paper."""
    feed_forward: FeedForwardConfig = field(default_factory=_recurrent_experts)
    heads: dict[str, TaskHeadConfig] = field(default_factory=dict)
    """By task; what the tasks of a run need is filled in by it."""

    def __post_init__(self) -> None:
        if self.patch_length < 1 or self.context_length < self.patch_length:
            raise ValueError(
                f"context_length ({self.context_length}) must hold at least one patch "
                f"(patch_length is {self.patch_length})"
            )
        if min(self.d_model, self.num_layers, self.num_heads) < 1 or self.d_model % self.num_heads:
            raise ValueError(
                f"d_model ({self.d_model}), num_layers ({self.num_layers}) and num_heads "
                f"({self.num_heads}) must be at least 1, d_model a multiple of num_heads"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")
        if isinstance(self.feed_forward, MoEConfig):
            self.feed_forward.check_alignment(self.d_model)
        for name, head in self.heads.items():
            if getattr(head, "shortcut", None) == "from_mean" and not self.normalises_windows:
                raise ValueError(
                    f"tasks.{name}.shortcut is from_mean, but normalises_windows is false, so "
                    "there is no mean to begin from; use shortcut=from_last or null"
                )
        if self.has_task_embedding and self._d_router is None:
            raise ValueError(
                "has_task_embedding is true, but only a recurrent router has an input for it; set "
                "feed_forward.router.type=recurrent"
            )

    @property
    def num_patches(self) -> int:
        """Tokens of a variate."""
        return -(-self.context_length // self.patch_length)

    @property
    def patch_stride(self) -> int:
        """Points between the starts of neighbouring patches: they do not overlap."""
        return self.patch_length

    @property
    def d_task_input(self) -> int | None:
        """Width of what the router is told of the task; None: nothing."""
        return self._d_router if self.has_task_embedding else None

    @property
    def _d_router(self) -> int | None:
        router = getattr(self.feed_forward, "router", None)
        return router.d_router if isinstance(router, RecurrentRouterConfig) else None


class PatchMoE(nn.Module):
    """Encodes the patches of each variate by itself, and answers through the head of a task.

    Source: PatchMoE (arXiv 2509.22279), section 3.
    """

    def __init__(
        self,
        config: PatchMoEConfig,
        *,
        seed: int = 0,
        make_experts: ExpertFactory = Experts,
        recomputes_activations: bool = False,
    ) -> None:
        """Build with weights drawn from `seed`; torch's own random state is left as it was."""
        super().__init__()
        self.config = config
        self.tasks = tuple(config.heads)
        self.recomputes_activations = recomputes_activations
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = PatchEmbedding(config.patch_length, config.d_model)
            # Modules, not bare parameters: DeepSpeed's stage 3 gathers weights where modules are.
            self.position = nn.Embedding(config.num_patches, config.d_model)
            self.dropout = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(
                EncoderBlock(
                    d_model=config.d_model,
                    num_heads=config.num_heads,
                    dropout=config.dropout,
                    norms_first=config.norms_first,
                    feed_forward=config.feed_forward,
                    layer_index=layer_index,
                    num_layers=config.num_layers,
                    seed=seed,
                    make_experts=make_experts,
                )
                for layer_index in range(config.num_layers)
            )
            self.task_input: nn.Embedding | None = None
            if config.d_task_input is not None:
                self.task_input = nn.Embedding(len(self.tasks), config.d_task_input)
            self.heads = nn.ModuleDict(
                {
                    name: build_task_head(
                        head,
                        d_model=config.d_model,
                        num_patches=config.num_patches,
                        patch_length=config.patch_length,
                        context_length=config.context_length,
                    )
                    for name, head in config.heads.items()
                }
            )
            self._initialise()
            share_memory(self.routers())

    def forward(
        self, values_BCL: Tensor, observed_BCL: Tensor, task: str | None = None
    ) -> TaskOutput:
        """Answer one task.

        Args:
            values_BCL: points in any unit, L the context length of the config.
            observed_BCL: True where recorded and shown; other values are ignored and may be NaN.
            task: one of the config's heads; None where there is one.

        Raises:
            ValueError: for another length, an unknown task, or none given where there are several.
        """
        task = self._check(values_BCL, task)
        normalised_BCL, loc_BC1, scale_BC1 = self.normalise(values_BCL, observed_BCL)
        cut = {"patch_length": self.config.patch_length, "patch_stride": self.config.patch_length}
        observed_BCNP = cut_patches(observed_BCL, **cut)
        patches_BCNP = cut_patches(normalised_BCL, **cut).to(self.embed.values.weight.dtype)
        place_N = torch.arange(self.config.num_patches, device=values_BCL.device)
        embedded_BCND = self.embed(patches_BCNP, observed_BCNP) + self.position(place_N)
        tokens_BCND = self.dropout(embedded_BCND)
        is_seen_BCN = observed_BCNP.any(-1)
        may_see_X11N = _visible(is_seen_BCN)
        state = self._first_state(task)
        routings: list[Routing] = []
        for block in self.blocks:
            if self.recomputes_activations and torch.is_grad_enabled():
                tokens_BCND, routing, state = checkpoint(
                    block, tokens_BCND, may_see_X11N, state, RoutingRecord(), use_reentrant=False
                )
            else:
                tokens_BCND, routing, state = block(tokens_BCND, may_see_X11N, state)
            if routing is not None:
                routings.append(routing)
        window_BCL = normalised_BCL.to(tokens_BCND.dtype)
        prediction = self.heads[task](tokens_BCND, is_seen_BCN, window_BCL).float()
        if self.config.fills_gaps and isinstance(self.heads[task], ReconstructionHead):
            prediction = prediction + normalised_BCL
        if prediction.ndim == 3:  # points, not classes
            prediction = prediction * scale_BC1 + loc_BC1
        if self.training and torch.is_grad_enabled():
            prediction = prediction + self._nothing_of_other_tasks(
                task, tokens_BCND, is_seen_BCN, window_BCL
            )
        return TaskOutput(prediction=prediction, tokens_BCND=tokens_BCND, routings=tuple(routings))

    def normalise(self, values_BCL: Tensor, observed_BCL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what embedding and shortcuts see of a window, its location and its scale.

        What is not observed is 0, or on a line where `fills_gaps` says so.
        """
        loc_BC1, scale_BC1 = self.statistics(values_BCL, observed_BCL)
        normalised_BCL = torch.where(observed_BCL, (values_BCL - loc_BC1) / scale_BC1, 0)
        if self.config.fills_gaps:
            normalised_BCL = fill_by_lines(normalised_BCL, observed_BCL)
        return normalised_BCL, loc_BC1, scale_BC1

    def arguments(self, batch: WindowBatch) -> dict[str, Any]:
        """Return what `forward` takes of a training batch: the context of its windows."""
        length = self.config.context_length
        return {
            "values_BCL": batch.values_BCL[..., :length],
            "observed_BCL": batch.observed_BCL[..., :length],
            "task": batch.task,
        }

    def routers(self) -> list[AnyRouter]:
        """Routers of the expert layers, in the order of `TaskOutput.routings`."""
        return [module.router for module in self.modules() if isinstance(module, MoELayer)]

    def _check(self, values_BCL: Tensor, task: str | None) -> str:
        if values_BCL.shape[-1] != self.config.context_length:
            raise ValueError(
                f"windows have {values_BCL.shape[-1]} points; the model takes context_length "
                f"({self.config.context_length})"
            )
        if task is None and len(self.tasks) == 1:
            return self.tasks[0]
        if task not in self.tasks:
            raise ValueError(f"task is {task}; the model has {', '.join(self.tasks) or 'none'}")
        return task

    def statistics(self, values_BCL: Tensor, observed_BCL: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of what is observed of each variate, float32."""
        if not self.config.normalises_windows:
            zero_BC1 = torch.zeros_like(values_BCL[..., :1], dtype=torch.float32)
            return zero_BC1, zero_BC1 + 1
        count_BC1 = observed_BCL.sum(-1, keepdim=True).clamp(min=1)
        masked_BCL = torch.where(observed_BCL, values_BCL.float(), 0)
        loc_BC1 = masked_BCL.sum(-1, keepdim=True) / count_BC1
        centred_BCL = torch.where(observed_BCL, values_BCL.float() - loc_BC1, 0)
        variance_BC1 = centred_BCL.square().sum(-1, keepdim=True) / count_BC1
        return loc_BC1, (variance_BC1 + _EPSILON).sqrt()

    def _first_state(self, task: str) -> RouterState | None:
        if self.task_input is None:
            return None
        number = torch.tensor([self.tasks.index(task)], device=self.task_input.weight.device)
        return RouterState(task_B11R=self.task_input(number).float()[:, None, None])

    def _nothing_of_other_tasks(
        self, task: str, tokens_BCND: Tensor, is_seen_BCN: Tensor, window_BCL: Tensor
    ) -> Tensor:
        """Return 0 that depends on the heads that rest, so that ranks exchange their gradients.

        Their gradient is zero; AdamW's momentum and decay still move them a little.

        The heads are called, as DeepSpeed's stage 3 gathers weights where modules are.
        """
        nothing = torch.zeros((), device=tokens_BCND.device)
        for name, head in self.heads.items():
            if name == task:
                continue
            seen: tuple[Tensor, ...] = (tokens_BCND, is_seen_BCN, window_BCL)
            wanted = cast(int | None, head.num_variates)
            if wanted is not None:
                # Those at hand stand in for the variates of its own windows.
                place_V = torch.arange(wanted) % tokens_BCND.shape[1]
                seen = tuple(part[:, place_V] for part in seen)
            nothing = nothing + 0.0 * head(*seen).float().sum()
        return nothing

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in self.heads.values():
            if isinstance(head, ForecastHead):
                head.begin_with_shortcut()
        nn.init.normal_(self.position.weight, std=0.02)
        if self.task_input is not None:
            nn.init.normal_(self.task_input.weight, std=0.5)


def _visible(is_seen_BCN: Tensor) -> Tensor:
    """Return which tokens others may look at: those with an observation, or all where none has."""
    may_see_BCN = is_seen_BCN | ~is_seen_BCN.any(-1, keepdim=True)
    return may_see_BCN.flatten(0, 1)[:, None, None]
