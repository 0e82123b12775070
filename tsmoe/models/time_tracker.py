"""Time Tracker: a causal patch transformer with sequence-routed experts (arXiv 2505.15151).

Shapes: B windows, C variates, L context points, N patches, P patch length, D model width, K values
per predicted point; 1 kept for broadcasting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsmoe.batch import WindowBatch
from tsmoe.config import Section
from tsmoe.heads import HeadConfig, PointHeadConfig, build_head
from tsmoe.models.block import Block, FeedForwardConfig
from tsmoe.models.output import ModelOutput
from tsmoe.moe.experts import Experts
from tsmoe.moe.layer import ExpertFactory, MoEConfig, MoELayer
from tsmoe.moe.replay import RoutingRecord
from tsmoe.moe.routers import AnyRouter
from tsmoe.moe.routers.recurrent import share_memory
from tsmoe.moe.routing import RouterState, Routing
from tsmoe.nn.instance_norm import InstanceNormConfig, instance_statistics, packed_statistics
from tsmoe.nn.linear_shortcut import LinearShortcut
from tsmoe.nn.patch import PatchEmbedding, cut_patches, patch_ends
from tsmoe.nn.rms_norm import RMSNorm
from tsmoe.nn.spans import SeriesSpans
from tsmoe.nn.variate_graph import Graph, VariateGraph, VariateGraphConfig


@dataclass(frozen=True, kw_only=True)
class TimeTrackerConfig(Section):
    """Time Tracker (arXiv 2505.15151). The paper states no sizes: the defaults are ours."""

    type: Literal["time_tracker"] = "time_tracker"
    patch_length: int = 96
    """Points in a patch; each token predicts as many points after it."""
    patch_stride: int = 96
    """Points between the starts of neighbouring patches; must divide `patch_length`."""
    context_length: int = 2880
    """Points that a forecast is made from."""
    lookahead_patches: int = 1
    """Patches that are forecast in one pass; more are rolled. 1 rolls patch by patch (the paper's).
    Ours: a rolled patch takes the one before it for observed and is too sure of itself."""
    d_model: int = 384
    num_layers: int = 6
    num_heads: int = 6
    dropout: float = 0.0
    """On the outputs of attention and feed-forward, while training."""
    rotary_base: float = 10000.0
    num_channel_mixed_layers: int = 0
    """Last layers in which a variate may look at others, as the graph of its window says; 0 in
    channel-independent pretraining. Ours: the pretrained layers themselves, no new ones."""
    graph: VariateGraphConfig = field(default_factory=VariateGraphConfig)
    """Of the variates; heeded where layers are channel-mixed."""
    linear_shortcut: bool = False
    """Add a linear map of the context to what tokens predict. Ours, see `LinearShortcut`."""
    instance_norm: InstanceNormConfig = field(default_factory=InstanceNormConfig)
    feed_forward: FeedForwardConfig = field(default_factory=MoEConfig)
    head: HeadConfig = field(default_factory=PointHeadConfig)

    def __post_init__(self) -> None:
        if self.patch_length < 1 or self.patch_stride < 1 or self.patch_length % self.patch_stride:
            raise ValueError(
                f"patch_stride ({self.patch_stride}) must divide patch_length "
                f"({self.patch_length}); both must be at least 1"
            )
        if self.context_length < self.patch_length:
            raise ValueError(
                f"context_length ({self.context_length}) must hold at least one patch "
                f"(patch_length is {self.patch_length})"
            )
        if self.context_length % self.patch_stride:
            below = self.context_length // self.patch_stride * self.patch_stride
            raise ValueError(
                f"context_length ({self.context_length}) must be a multiple of patch_stride "
                f"({self.patch_stride}); nearest are {below} and {below + self.patch_stride}"
            )
        if not 1 <= self.lookahead_patches <= self.context_length // self.patch_length:
            raise ValueError(
                f"lookahead_patches ({self.lookahead_patches}) must be at least 1 and at most the "
                f"{self.context_length // self.patch_length} patches of the context"
            )
        if min(self.d_model, self.num_layers, self.num_heads) < 1 or self.rotary_base <= 1:
            raise ValueError(
                f"d_model ({self.d_model}), num_layers ({self.num_layers}) and num_heads "
                f"({self.num_heads}) must be at least 1, rotary_base ({self.rotary_base}) above 1"
            )
        if not 0 <= self.num_channel_mixed_layers <= self.num_layers:
            raise ValueError(
                f"num_channel_mixed_layers ({self.num_channel_mixed_layers}) must lie between 0 "
                f"and num_layers ({self.num_layers})"
            )
        if isinstance(self.feed_forward, MoEConfig):
            self.feed_forward.check_alignment(self.d_model)
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of twice num_heads "
                f"({self.num_heads}), as rotary embedding turns pairs of coordinates"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")

    @property
    def window_length(self) -> int:
        """Points of a training window: the context and the patch after its last token."""
        return self.context_length + self.patch_length


class TimeTracker(nn.Module):
    """Predicts, from each token of each variate, the patch that follows it.

    Source: Time Tracker (arXiv 2505.15151).
    """

    def __init__(
        self,
        config: TimeTrackerConfig,
        *,
        seed: int = 0,
        make_experts: ExpertFactory = Experts,
        recomputes_activations: bool = False,
    ) -> None:
        """Build with weights drawn from `seed`; torch's own random state is left as it was."""
        super().__init__()
        self.config = config
        self.recomputes_activations = recomputes_activations
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = PatchEmbedding(config.patch_length, config.d_model)
            self.blocks = nn.ModuleList(
                Block(
                    d_model=config.d_model,
                    num_heads=config.num_heads,
                    rotary_base=config.rotary_base,
                    dropout=config.dropout,
                    feed_forward=config.feed_forward,
                    layer_index=layer_index,
                    num_layers=config.num_layers,
                    seed=seed,
                    make_experts=make_experts,
                )
                for layer_index in range(config.num_layers)
            )
            self.variate_graph: VariateGraph | None = None
            if config.num_channel_mixed_layers:
                self.variate_graph = VariateGraph(config.graph)
            self.output_norm = RMSNorm(config.d_model)
            self.head = build_head(config.head, config.d_model, config.patch_length)
            self._initialise()
            # Behind it: it starts at zero, and the other weights are those of a model without it.
            self.shortcut: LinearShortcut | None = None
            if config.linear_shortcut:
                self.shortcut = LinearShortcut(
                    num_points=config.context_length,
                    patch_length=config.patch_length,
                    patch_stride=config.patch_stride,
                    lookahead_patches=config.lookahead_patches,
                )
            share_memory(self.routers())

    def forward(
        self,
        values_BCL: Tensor,
        observed_BCL: Tensor,
        adjacency_BCC: Tensor | None = None,
        *,
        series_BCN: Tensor | None = None,
        is_covariate_BC: Tensor | None = None,
    ) -> ModelOutput:
        """Predict the patch after each token.

        Args:
            values_BCL: points in any unit; L need not be a multiple of the patch length.
            observed_BCL: True where recorded; other values are ignored and may be NaN.
            adjacency_BCC: which variates may look at which in the channel-mixed layers; None asks
                the model's own graph.
            series_BCN: of packed windows, see `WindowBatch`: each series is seen as if alone.
            is_covariate_BC: True for variates that others may always look at and that look at none.

        Raises:
            ValueError: if an adjacency or packed windows are given that the layers have no use for.
        """
        adjacency_BCC, graph = self._graph_of(
            values_BCL, observed_BCL, adjacency_BCC, series_BCN, is_covariate_BC
        )
        cut = {"patch_length": self.config.patch_length, "patch_stride": self.config.patch_stride}
        patches_BCNP = cut_patches(values_BCL, **cut)
        observed_BCNP = cut_patches(observed_BCL, **cut)
        count = patches_BCNP.shape[2]
        padding = (count - 1) * cut["patch_stride"] + cut["patch_length"] - values_BCL.shape[-1]
        mode = self.config.instance_norm.mode
        spans: SeriesSpans | None = None
        if series_BCN is None:
            ends = patch_ends(count, device=values_BCL.device, **cut) - padding
            statistics = instance_statistics(values_BCL, observed_BCL, ends, mode=mode)
        else:
            if padding or series_BCN.shape != patches_BCNP.shape[:3]:
                raise ValueError(
                    f"series_BCN has shape {tuple(series_BCN.shape)} for {values_BCL.shape[-1]} "
                    f"points; expected {tuple(patches_BCNP.shape[:3])} and whole patches"
                )
            spans = SeriesSpans.of(series_BCN)
            statistics = packed_statistics(values_BCL, observed_BCL, spans, mode=mode, **cut)
            observed_BCNP = observed_BCNP & spans.is_token_BCN[..., None]
        normalised_BCNP = (patches_BCNP - statistics.loc_BCN1) / statistics.scale_BCN1
        normalised_BCNP = torch.where(observed_BCNP, normalised_BCNP, 0)
        tokens_BCND = self.embed(normalised_BCNP.to(self.embed.values.weight.dtype), observed_BCNP)
        routings: list[Routing] = []
        state: RouterState | None = None
        first_mixed = self.config.num_layers - self.config.num_channel_mixed_layers
        for layer, block in enumerate(self.blocks):
            seen_BCC = adjacency_BCC if layer >= first_mixed else None
            if self.recomputes_activations and torch.is_grad_enabled():
                tokens_BCND, routing, state = checkpoint(
                    block,
                    tokens_BCND,
                    seen_BCC,
                    state,
                    spans=spans,
                    record=RoutingRecord(),
                    use_reentrant=False,
                )
            else:
                tokens_BCND, routing, state = block(tokens_BCND, seen_BCC, state, spans=spans)
            if routing is not None:
                routings.append(routing)
        prediction_BCNPK = self.head(self.output_norm(tokens_BCND))
        if self.shortcut is not None:
            added_BCNP = self.shortcut(values_BCL, observed_BCL, statistics, spans)
            prediction_BCNPK = prediction_BCNPK + added_BCNP[..., None]
        return ModelOutput(
            prediction_BCNPK=prediction_BCNPK,
            statistics=statistics,
            routings=tuple(routings),
            spans=spans,
            graph=graph,
        )

    def _graph_of(
        self,
        values_BCL: Tensor,
        observed_BCL: Tensor,
        adjacency_BCC: Tensor | None,
        series_BCN: Tensor | None,
        is_covariate_BC: Tensor | None,
    ) -> tuple[Tensor | None, Graph | None]:
        """Return what the channel-mixed layers look along, and the graph it comes from."""
        if self.variate_graph is None:
            if adjacency_BCC is not None:
                raise ValueError("an adjacency is given, but num_channel_mixed_layers is 0")
            return None, None
        if series_BCN is not None:
            raise ValueError(
                "packed windows hold strangers, which channel-mixed layers cannot keep apart; "
                "num_channel_mixed_layers must be 0 for them"
            )
        if adjacency_BCC is not None:
            return adjacency_BCC, None
        graph: Graph = self.variate_graph(values_BCL, observed_BCL, is_covariate_BC)
        return graph.adjacency_BCC, graph

    def arguments(self, batch: WindowBatch) -> dict[str, Tensor | None]:
        """Return what `forward` takes of a training batch: the context of its windows."""
        length = self.config.context_length
        return {
            "values_BCL": batch.values_BCL[..., :length],
            "observed_BCL": batch.observed_BCL[..., :length],
            "series_BCN": batch.series_BCN,
            "is_covariate_BC": batch.is_covariate_BC,
        }

    def routers(self) -> list[AnyRouter]:
        """Routers of the expert layers, in the order of `ModelOutput.routings`."""
        return [module.router for module in self.modules() if isinstance(module, MoELayer)]

    def _initialise(self) -> None:
        # Ways back to the residual stream are small, so that depth does not add up their noise.
        returning = ("attention.output", "down")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith(returning):
                    std /= (2 * self.config.num_layers) ** 0.5
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A constant patch is all zeros after instance norm. Embedded as zero it would meet RMSNorm
        # where its gradient is 1/eps: the first gradient norm was 6e7 instead of 2.
        nn.init.normal_(self.embed.values.bias, std=0.5)
