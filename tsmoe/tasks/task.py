"""What a task is to a run: where its windows come from, and how a model is judged in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tsmoe.batch import WindowBatch
from tsmoe.heads.task import TaskHeadConfig
from tsmoe.tasks.config import PointLoss
from tsmoe.tasks.predictor import TaskPredictor
from tsmoe.tasks.windows import Integers

MODEL = "tsmoe"
"""Name of the model's own row among the results."""


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """Figures of a model and of baselines on the test part."""

    task: str
    """Kind of the task."""
    data: str
    facts: Mapping[str, Any]
    """What was done, such as context and number of windows."""
    results: list[dict[str, Any]]
    """One row for each model, or for each model and setting; `model` names it."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """What is too long for a row, such as figures by entity."""
    notes: Sequence[str] = ()
    """What one should know of the figures."""

    def describe(self) -> str:
        """Return the facts in one line."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.facts.items())

    def to_json_dict(self) -> dict[str, Any]:
        """Give the result file of `tsmoe evaluate --json`."""
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {"task": self.task, "data": self.data, **self.facts, "results": self.results,
                **self.tables, **notes}  # fmt: skip


class Task(Protocol):
    """A task with its data opened."""

    name: str
    source: str
    """The file, for people."""
    fingerprint: str
    """Hash of what is learned from."""
    context_length: int
    """Points that the model must see."""
    num_train: int
    """Training windows."""
    num_validation: int
    """Validation windows."""
    loss_of_points: PointLoss

    def head(self) -> TaskHeadConfig:
        """Return the head that answers."""
        ...

    def training_batch(self, items: Integers, positions: Integers) -> WindowBatch:
        """Cut training windows; what is drawn for them depends on their positions in the run."""
        ...

    def validation_batch(self, places: Integers) -> WindowBatch:
        """Cut validation windows, the same ones each time."""
        ...

    def series_name(self, number: int) -> str:
        """Name what a window was cut from."""
        ...

    def card(self, predictor: TaskPredictor | None = None) -> dict[str, Any]:
        """Return what predicting needs to know, for the card of a package.

        Args:
            predictor: of the trained model, for what only it can tell; None before training.
        """
        ...

    def evaluate(self, predictor: TaskPredictor) -> TaskEvaluation:
        """Judge a model by the test part."""
        ...
