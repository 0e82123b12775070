"""A linear map from the points before a forecast to the forecast, beside the tokens.

Shapes: B windows, C variates, L points, N patches, P patch length, W points that are seen;
1 kept for broadcasting.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsmoe.nn.instance_norm import InstanceStatistics
from tsmoe.nn.spans import SeriesSpans


class LinearShortcut(nn.Module):
    """Adds, to what each token predicts, a linear map of the last W points up to its end.

    Ours for Time Tracker: a patch transformer has to learn by heart what least squares finds at
    once. The global residual of TiDE (arXiv 2304.08424), made causal, and starting at zero, so
    that a pretrained model is at first what it was. Where whole patches are missing before the end
    of a token, which forecasts several patches ahead, its map is another one.
    """

    def __init__(
        self, *, num_points: int, patch_length: int, patch_stride: int, lookahead_patches: int
    ) -> None:
        super().__init__()
        self.num_points, self.patch_stride = num_points, patch_stride
        self.patch_length, self.lookahead_patches = patch_length, lookahead_patches
        self.project = nn.Linear(num_points, lookahead_patches * patch_length, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(
        self,
        values_BCL: Tensor,
        observed_BCL: Tensor,
        statistics: InstanceStatistics,
        spans: SeriesSpans | None = None,
    ) -> Tensor:
        """Return what is added, of shape (B, C, N, P), in the location and scale of each token.

        Args:
            values_BCL: points in any unit, the last one at the end of the last token.
            observed_BCL: True where recorded; others count as the location.
            statistics: of each token.
            spans: of packed windows; a token sees points of its own series alone.
        """
        seen_BCNW, gap_BCN = self.see(values_BCL, observed_BCL, statistics, spans)
        ahead = self.project(seen_BCNW.to(self.project.weight.dtype))
        if self.lookahead_patches == 1:
            return ahead
        ahead = ahead.unflatten(-1, (self.lookahead_patches, self.patch_length))
        index = gap_BCN[..., None, None].expand(-1, -1, -1, 1, self.patch_length)
        return ahead.gather(3, index).squeeze(3)

    def see(
        self,
        values_BCL: Tensor,
        observed_BCL: Tensor,
        statistics: InstanceStatistics,
        spans: SeriesSpans | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what the map of each token sees, and which map it is. Arguments as above.

        Returns:
            The points up to the token's end, normalised, 0 where not observed, of shape
            (B, C, N, W); and how many whole patches are missing before that end, int64 of shape
            (B, C, N), at most `lookahead_patches` - 1.
        """
        count = statistics.loc_BCN1.shape[2]
        missing = (count - 1) * self.patch_stride + self.num_points - values_BCL.shape[-1]
        values_BCNW, seen_BCNW = (
            F.pad(points, (missing, 0)).unfold(-1, self.num_points, self.patch_stride)
            for points in (values_BCL, observed_BCL)
        )
        if spans is not None:
            seen_BCNW = seen_BCNW & self._is_of_series(spans)
        values_BCNW = (values_BCNW - statistics.loc_BCN1) / statistics.scale_BCN1
        return torch.where(seen_BCNW, values_BCNW, 0), self._gaps(observed_BCL, count)

    def _gaps(self, observed_BCL: Tensor, count: int) -> Tensor:
        """Return gap_BCN; where a packed series has no observation yet, that of those before it.

        There its map sees zeros alone.
        """
        length = observed_BCL.shape[-1]
        place_L = torch.arange(1, length + 1, device=observed_BCL.device)
        last_BCL = torch.where(observed_BCL, place_L, 0).cummax(-1).values
        end_N = length - self.patch_stride * torch.arange(count - 1, -1, -1, device=place_L.device)
        gap_BCN = (end_N - last_BCL[..., end_N - 1]) // self.patch_length
        # A token whose points are all padding ends before the first point.
        return gap_BCN.clamp(min=0, max=self.lookahead_patches - 1)

    def _is_of_series(self, spans: SeriesSpans) -> Tensor:
        """Return bool of shape (B, C, N, W): which of the points are of the token's series."""
        device = spans.first_BCN.device
        end_N = torch.arange(spans.first_BCN.shape[-1], device=device) * self.patch_stride
        end_N += self.patch_length
        place_NW = end_N[:, None] - torch.arange(self.num_points, 0, -1, device=device)
        first_BCN1 = spans.first_BCN[..., None] * self.patch_stride
        return (place_NW >= first_BCN1) & spans.is_token_BCN[..., None]
