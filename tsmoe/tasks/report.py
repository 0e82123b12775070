"""The figures of a task as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tsmoe.tasks.task import TaskEvaluation

# More do not fit on a usual terminal.
_MOST_COLUMNS = 7

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


def print_evaluation(console: Console, evaluation: TaskEvaluation, *, title: str) -> None:
    """Print what was done, the figures, and what one should know of them."""
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    console.print(results_table(evaluation.results))
    for note in evaluation.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def results_table(results: Sequence[dict[str, Any]]) -> RichTable:
    """Lay out one row per model and one column per figure, or the other way round if many."""
    from rich.table import Table as RichTable

    columns = list(dict.fromkeys(key for row in results for key in row))
    table = RichTable()
    if len(columns) > _MOST_COLUMNS:
        table.add_column("")
        for row in results:
            table.add_column(_text(row.get("model")), justify="right")
        for column in columns[1:]:
            table.add_row(column.replace("_", " "), *(_text(row.get(column)) for row in results))
        return table
    for column in columns:
        is_text = any(isinstance(row.get(column), str) for row in results)
        table.add_column(
            column.replace("_", " "), justify="left" if is_text else "right", overflow="fold"
        )
    for row in results:
        table.add_row(*(_text(row.get(column)) for column in columns))
    return table


def _text(value: Any) -> str:  # text, a number or None
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
