"""A graph of the variates of a window, from how alike their frequencies are.

Source: Time Tracker (arXiv 2505.15151), the frequency-domain graph: spectra, distances of
amplitudes, edge probabilities, a sample of them. The paper gives no formula from distance to
probability; ours follows DUET's channel mask (arXiv 2412.10859) with the weight `alpha`.

Shapes: B windows, C variates, L points, F frequencies, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tsmoe.config import Section
from tsmoe.nn.instance_norm import instance_statistics

# Of a distance; two variates that are copies of one another have none.
_EPSILON = 1e-6
# Segments that a window is cut into to see whether phases keep step; they overlap by half.
_SEGMENTS = 4
# Bounds of a probability, so that its logarithm is finite.
_LEAST = 1e-6


@dataclass(frozen=True, kw_only=True)
class VariateGraphConfig(Section):
    """How variates find the neighbours that they look at."""

    measure: Literal["amplitude", "coherence"] = "amplitude"
    """`amplitude`: L1 distance of the amplitudes of all frequencies (the paper's), blind to what
    happens when. Ours, `coherence`: 1 less the share of power that keeps step, which lag leaves
    high and chance low."""
    alpha: float = 0.9
    """Probability of the edge to the nearest neighbour; of others, less. At 0.5 and below no edge
    is left in evaluation."""
    is_alpha_learned: bool = False
    """Learn alpha by straight-through gradients of the sampled edges, which costs memory over all
    pairs of tokens while training; `alpha` is where it begins."""
    temperature: float = 1.0
    """Of the Gumbel-Softmax; heeded where alpha is learned, as samples do not depend on it."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or self.temperature <= 0:
            raise ValueError(
                f"alpha ({self.alpha}) must lie between 0 and 1, temperature "
                f"({self.temperature}) above 0"
            )


@dataclass(frozen=True)
class Graph:
    """Who may look at whom: row i is of variate i, which always looks at itself."""

    edge_probability_BCC: Tensor
    adjacency_BCC: Tensor
    """Bool; numbers of 0 and 1 that want a gradient where alpha is learned, while training."""


class VariateGraph(nn.Module):
    """Finds one graph per window: sampled while training, its likely edges in evaluation."""

    def __init__(self, config: VariateGraphConfig) -> None:
        """Begin with the alpha of the config."""
        super().__init__()
        self.config = config
        if config.is_alpha_learned:
            self.alpha_logit = nn.Parameter(torch.logit(torch.tensor([config.alpha])))

    @property
    def alpha(self) -> Tensor:
        """Probability of the edge to the nearest neighbour, of shape (1,)."""
        if self.config.is_alpha_learned:
            return self.alpha_logit.float().sigmoid()
        return torch.tensor([self.config.alpha])

    def forward(
        self, values_BCL: Tensor, observed_BCL: Tensor, is_covariate_BC: Tensor | None = None
    ) -> Graph:
        """Find the graph of each window.

        Args:
            values_BCL: points in any unit.
            observed_BCL: True where recorded; other values are ignored and may be NaN. Nobody looks
                at a variate without observations.
            is_covariate_BC: True for variates that all others look at and that look at none.
        """
        distance_BCC = variate_distances(values_BCL, observed_BCL, self.config.measure)
        is_own_CC = torch.eye(values_BCL.shape[1], dtype=torch.bool, device=values_BCL.device)
        # Neighbours to choose from: not oneself, no covariates, none without observations.
        may_look_BCC = ~is_own_CC & observed_BCL.any(-1)[:, None, :]
        always_BCC = is_own_CC.expand_as(distance_BCC)
        if is_covariate_BC is not None:
            looks_at_covariate_BCC = ~is_covariate_BC[:, :, None] & is_covariate_BC[:, None, :]
            always_BCC = always_BCC | (looks_at_covariate_BCC & may_look_BCC)
            may_look_BCC = may_look_BCC & ~(is_covariate_BC[:, :, None] | is_covariate_BC[:, None])
        nearness_BCC = _nearness(distance_BCC, may_look_BCC)
        probability_BCC = (self.alpha.to(nearness_BCC.device) * nearness_BCC).masked_fill(
            always_BCC, 1
        )
        if not self.training:
            return Graph(probability_BCC.detach(), probability_BCC.detach() > 0.5)
        adjacency_BCC = self._sample(probability_BCC, may_look_BCC, always_BCC)
        return Graph(probability_BCC.detach(), adjacency_BCC)

    def _sample(self, probability_BCC: Tensor, may_look_BCC: Tensor, always_BCC: Tensor) -> Tensor:
        """Sample edges by Gumbel-Softmax of the logits [log p, log(1 - p)], hard."""
        bounded_BCC = probability_BCC.clamp(_LEAST, 1 - _LEAST)
        # The difference of two Gumbel variables is logistic.
        uniform_BCC = torch.rand_like(bounded_BCC).clamp(_LEAST, 1 - _LEAST)
        score_BCC = torch.logit(bounded_BCC) + torch.logit(uniform_BCC)
        is_edge_BCC = (score_BCC > 0) & may_look_BCC | always_BCC
        if not self.config.is_alpha_learned:
            return is_edge_BCC
        soft_BCC = torch.sigmoid(score_BCC / self.config.temperature) * may_look_BCC
        # An edge that is there or not, with the gradient of one that is so to a degree.
        return is_edge_BCC.float() + (soft_BCC - soft_BCC.detach())


def _nearness(distance_BCC: Tensor, may_look_BCC: Tensor) -> Tensor:
    """Return 1 for the nearest neighbour, less for others by their distance, 0 for no neighbour."""
    among_BCC = distance_BCC.masked_fill(~may_look_BCC, float("inf"))
    nearest_BC1 = among_BCC.amin(-1, keepdim=True)
    nearness_BCC = (nearest_BC1 + _EPSILON) / (distance_BCC + _EPSILON)
    return torch.where(may_look_BCC, nearness_BCC, 0)


@torch.no_grad()
def variate_distances(
    values_BCL: Tensor, observed_BCL: Tensor, measure: Literal["amplitude", "coherence"]
) -> Tensor:
    """Return distances of all pairs of variates, BCC, symmetric, 0 for copies.

    Each variate is scaled by its own mean and deviation first, as amplitudes would measure its unit
    otherwise; the mean, frequency 0, is left out. Points that were not observed count as the mean.
    """
    length = values_BCL.shape[-1]
    ends = torch.tensor([length], device=values_BCL.device)
    statistics = instance_statistics(values_BCL, observed_BCL, ends, mode="window")
    loc_BC1, scale_BC1 = statistics.loc_BCN1[:, :, 0], statistics.scale_BCN1[:, :, 0]
    scaled_BCL = (values_BCL - loc_BC1) / scale_BC1
    scaled_BCL = torch.where(observed_BCL, scaled_BCL, 0).float()
    if measure == "coherence":
        return _incoherence(scaled_BCL)
    amplitude_BCF = torch.fft.rfft(scaled_BCL, norm="ortho").abs()[..., 1:]
    return torch.cdist(amplitude_BCF, amplitude_BCF, p=1)


def _incoherence(scaled_BCL: Tensor) -> Tensor:
    """Return 1 less the coherence of all pairs, weighted by power over frequencies.

    Source: magnitude-squared coherence by Welch's method (IEEE Trans. Audio Electroacoust. 15(2),
    1967), over Hann-windowed segments that overlap by half.
    """
    length = scaled_BCL.shape[-1]
    segment = max(2, length // _SEGMENTS)
    parts_BCSL = scaled_BCL.unfold(-1, min(segment, length), max(1, segment // 2))
    taper_L = torch.hann_window(parts_BCSL.shape[-1] + 1, device=scaled_BCL.device)[1:]
    tapered_BCSL = (parts_BCSL - parts_BCSL.mean(-1, keepdim=True)) * taper_L
    spectra_FBCS = torch.fft.rfft(tapered_BCSL, norm="ortho")[..., 1:].permute(3, 0, 1, 2)
    together = torch.zeros(*scaled_BCL.shape[:2], scaled_BCL.shape[1], device=scaled_BCL.device)
    possible = torch.zeros_like(together)
    # Frequency by frequency, as all pairs at all frequencies would not fit for many variates.
    for spectra_BCS in spectra_FBCS:
        together += (spectra_BCS @ spectra_BCS.mH).abs().square()
        power_BC = spectra_BCS.abs().square().sum(-1)
        possible += power_BC[:, :, None] * power_BC[:, None, :]
    return 1 - (together / possible.clamp(min=1e-30)).clamp(0, 1)
