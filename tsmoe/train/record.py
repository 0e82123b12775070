"""What the first rank shows and writes while a run goes on; the other ranks do nothing here."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tsmoe.models import ModelConfig
from tsmoe.moe.routers import AnyRouter
from tsmoe.ranks import Ranks
from tsmoe.train.held_out import HeldOutForecast
from tsmoe.train.metrics import MetricsWriter, load_biases
from tsmoe.train.progress import TrainingProgress
from tsmoe.train.run_config import LoopConfig
from tsmoe.train.step import StepReport
from tsmoe.train.throughput import Peak, find_peak, throughput


class RecordedRun(Protocol):
    """What is asked of a run's configuration."""

    @property
    def run(self) -> str: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def training(self) -> LoopConfig: ...


class RunRecord:
    """Metrics on disk and progress on the screen. Use as a context manager."""

    def __init__(
        self,
        config: RecordedRun,
        *,
        first_step: int,
        ranks: Ranks,
        doing: str = "pretraining",
        learns_all: bool = True,
    ) -> None:
        """Open the run's files on the first rank, and find out what its machine can compute.

        Args:
            learns_all: whether all weights learn; else operations are not counted.
        """
        self._counts_flops = learns_all
        training = config.training
        self._model = config.model
        self._progress = TrainingProgress(
            steps=training.steps,
            first_step=first_step,
            log_every_steps=training.log_every_steps,
            is_shown=ranks.is_first,
            doing=doing,
        )
        self._writer: MetricsWriter | None = None
        self._peak = Peak(flops_per_second=None, source="not asked for")
        self._open_writer = functools.partial(
            MetricsWriter, Path(config.run), log_every_steps=training.log_every_steps
        )
        if ranks.is_first:
            self._peak = find_peak(ranks, training.precision)
            self._writer = self._open_writer(
                first_step=first_step,
                start={"ranks": ranks.size, "peak_flops": self._peak.flops_per_second,
                       "peak_is": self._peak.source},
            )  # fmt: skip

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
        speed = throughput(
            self._model,
            report,
            self._peak,
            seconds=seconds,
            seconds_waited=seconds_waited,
            counts_flops=self._counts_flops,
        )
        if self._writer is not None:
            self._writer.write_step(step, report, bias_ME=load_biases(routers), speed=speed)
        self._progress.advanced(step + 1, loss=report.loss, speed=speed)

    def mixed(self, step: int, source_shares: Mapping[str, float]) -> None:
        """Record in which shares the sources were seen up to a step, where that is known."""
        if self._writer is not None and source_shares:
            self._writer.write_sources(step, source_shares)

    def streamed(self, step: int, counts: Mapping[str, Any]) -> None:
        """Record how far a stream was read up to a step, where there is one."""
        if self._writer is not None and counts:
            self._writer.write_stream(step, counts)

    def not_finite(self, step: int, event: Mapping[str, Any]) -> None:
        """Record what was not finite and not learned from."""
        if self._writer is not None:
            self._writer.write_not_finite(step, event)

    def go_back(self, step: int) -> None:
        """Drop what was recorded from a step on: it is done again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = self._open_writer(first_step=step)

    def validated(
        self,
        step: int,
        loss: float,
        *,
        seconds: float,
        forecasts: Sequence[HeldOutForecast] = (),
    ) -> None:
        """Record the validation loss after a step, what it took, and some of its forecasts."""
        self._progress.validated(loss)
        if self._writer is not None:
            self._writer.write_validation(step, loss, seconds=seconds, forecasts=forecasts)
