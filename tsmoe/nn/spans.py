"""Where each series of a packed window lies, so that none sees another.

Several short series may share a window, one after another; each has a span of tokens. Tokens of no
series (fill, or a patch that is only the target of the one before it) are alone.

Shapes: B windows, C variates, N patches, M patches that are looked at (as many), D any width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The number of a token that belongs to no series.
NO_SERIES = -1


@dataclass(frozen=True, kw_only=True)
class SeriesSpans:
    """The span of tokens that each token belongs to."""

    is_token_BCN: Tensor
    """bool; True where the token is one of a series."""
    first_BCN: Tensor
    """int64; the first token of the span, of a token of no series itself."""
    last_BCN: Tensor
    """int64; the last token of the span, of a token of no series itself."""

    @classmethod
    def of(cls, series_BCN: Tensor) -> SeriesSpans:
        """Find the spans.

        Args:
            series_BCN: integer; number of the series of each token, `NO_SERIES` for none. Tokens
                of a series follow one another.
        """
        place_N = torch.arange(series_BCN.shape[-1], device=series_BCN.device)
        is_token_BCN = series_BCN != NO_SERIES
        is_edge_BCN = (series_BCN[..., 1:] != series_BCN[..., :-1]) | ~is_token_BCN[..., 1:]
        is_end_BC1 = torch.ones_like(is_token_BCN[..., :1])
        is_first_BCN = torch.cat((is_end_BC1, is_edge_BCN), dim=-1)
        is_last_BCN = torch.cat((is_edge_BCN, is_end_BC1), dim=-1)
        count = len(place_N)
        last_BCN = torch.where(is_last_BCN, place_N, count).flip(-1).cummin(-1).values.flip(-1)
        return cls(
            is_token_BCN=is_token_BCN,
            first_BCN=torch.where(is_first_BCN, place_N, 0).cummax(-1).values,
            last_BCN=last_BCN,
        )

    def is_past(self) -> Tensor:
        """Return is_past_BCNM: which tokens of its span come before a token, itself among them."""
        place_N = torch.arange(self.first_BCN.shape[-1], device=self.first_BCN.device)
        return (place_N >= self.first_BCN[..., None]) & (place_N <= place_N[:, None])

    def is_same(self) -> Tensor:
        """Return is_same_BCNM: which tokens are of the span of a token."""
        place_N = torch.arange(self.first_BCN.shape[-1], device=self.first_BCN.device)
        return (place_N >= self.first_BCN[..., None]) & (place_N <= self.last_BCN[..., None])

    def is_last(self) -> Tensor:
        """Return is_last_BCN: which tokens are the last of a series."""
        place_N = torch.arange(self.last_BCN.shape[-1], device=self.last_BCN.device)
        return self.is_token_BCN & (self.last_BCN == place_N)


def mean_within(values_BCND: Tensor, is_within_BCNM: Tensor) -> Tensor:
    """Average, for each token, the values of the tokens that it may look at.

    A product with a mask, not a difference of running sums: of what another series holds not even
    a rounding error must come through.
    """
    is_within_BCNM = is_within_BCNM.to(values_BCND.dtype)
    return is_within_BCNM @ values_BCND / is_within_BCNM.sum(-1, keepdim=True)
