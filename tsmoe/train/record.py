"""What the first rank shows and writes while a run goes on; the other ranks do nothing here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tsmoe.moe.routers import AnyRouter
from tsmoe.ranks import Ranks
from tsmoe.train.metrics import MetricsWriter, load_biases
from tsmoe.train.progress import TrainingProgress
from tsmoe.train.step import StepReport


class RunRecord:
    """Metrics on disk and progress on the screen. Use as a context manager."""

    def __init__(
        self, run: Path, *, first_step: int, steps: int, log_every_steps: int, ranks: Ranks
    ) -> None:
        self._progress = TrainingProgress(
            steps=steps,
            first_step=first_step,
            log_every_steps=log_every_steps,
            is_shown=ranks.is_first,
        )
        self._writer: MetricsWriter | None = None
        if ranks.is_first:
            self._writer = MetricsWriter(
                run, first_step=first_step, log_every_steps=log_every_steps
            )

    def __enter__(self) -> RunRecord:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        if self._writer is not None:
            self._writer.close()

    def stepped(
        self,
        step: int,
        report: StepReport,
        routers: list[AnyRouter],
        *,
        seconds: float,
        seconds_waited: float,
    ) -> None:
        """Record a step that took `seconds`, of which this rank waited for data in some."""
        points_per_second = report.num_points / seconds
        if self._writer is not None:
            self._writer.write_step(
                step,
                report,
                bias_ME=load_biases(routers),
                points_per_second=points_per_second,
                data_wait_share=seconds_waited / seconds,
            )
        self._progress.advanced(step + 1, loss=report.loss, points_per_second=points_per_second)

    def mixed(self, step: int, source_shares: Mapping[str, float]) -> None:
        """Record in which shares the sources were seen up to a step, where that is known."""
        if self._writer is not None and source_shares:
            self._writer.write_sources(step, source_shares)

    def streamed(self, step: int, counts: Mapping[str, Any]) -> None:
        """Record how far a stream was read up to a step, where there is one."""
        if self._writer is not None and counts:
            self._writer.write_stream(step, counts)

    def validated(self, step: int, loss: float) -> None:
        """Record the validation loss after a step."""
        self._progress.validated(loss)
        if self._writer is not None:
            self._writer.write_validation(step, loss)
