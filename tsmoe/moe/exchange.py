"""Rows on their way between ranks while something else is computed, forward and backward.

An exchange is started in one place and finished in another. Autograd runs the backward passes of
what lies between the two between the way back's start and finish: it takes what came later first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from tsmoe.ranks import ExchangeLabel, PendingRows, Ranks


class Exchange:
    """One exchange of rows, and that of their gradients back. Used once; every rank must."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        send: Sequence[int],
        receive: Sequence[int],
        label: ExchangeLabel,
        back_label: ExchangeLabel,
    ) -> None:
        """Plan it; see `Ranks.start_all_to_all`. Labels are of the rows and of their gradients."""
        self._ranks = ranks
        self._send, self._receive = send, receive
        self._label, self._back_label = label, back_label
        self._pending: PendingRows | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send rows; return a ticket that carries nothing but the place in autograd's graph."""
        return _Start.apply(rows, self)

    def finish(self, ticket: Tensor) -> Tensor:
        """Wait for the rows that were sent here."""
        return _Finish.apply(ticket, self)

    def _issue(self, rows: Tensor) -> None:
        self._pending = self._ranks.start_all_to_all(
            rows, send=self._send, receive=self._receive, label=self._label
        )

    def _issue_back(self, gradient: Tensor) -> None:
        self._pending = self._ranks.start_all_to_all(
            gradient, send=self._receive, receive=self._send, label=self._back_label
        )

    def _wait(self) -> Tensor:
        assert self._pending is not None
        rows, self._pending = self._pending.wait(), None
        return rows


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange._issue(rows)
        return rows.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._wait(), None


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, _ticket: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._issue_back(gradient)
        return gradient.new_empty(0), None
