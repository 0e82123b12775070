"""What a forward pass returns: everything the step produced.

Shapes: B windows, C variates, N patches, P points of the predicted patch, K values per point
(1, or quantile levels).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tsmoe.moe.routing import Routing
from tsmoe.nn.instance_norm import InstanceStatistics
from tsmoe.nn.spans import SeriesSpans
from tsmoe.nn.variate_graph import Graph


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """Predictions in normalised units with the statistics that scale them back."""

    prediction_BCNPK: Tensor
    """Of the patch after each token, measured in that token's location and scale."""
    statistics: InstanceStatistics
    routings: tuple[Routing, ...]
    """One per expert layer, first layer first."""
    spans: SeriesSpans | None = None
    """Of packed windows; what is predicted by tokens of no series has no meaning."""
    graph: Graph | None = None
    """Of the variates of each window, where layers mix them by a graph of the model's own."""


@dataclass(frozen=True, kw_only=True)
class TaskOutput:
    """The answer of a supervised model to one task."""

    prediction: Tensor
    """Points in the unit of the values, by window, variate and step, or logits of classes."""
    tokens_BCND: Tensor
    """Of the last layer: what the head saw."""
    routings: tuple[Routing, ...]
    """One per expert layer, first layer first."""
