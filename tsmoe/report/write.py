"""Write a run's report: pictures, one page that holds them all, and the numbers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsmoe.report.history import read_run
from tsmoe.report.page import page
from tsmoe.report.pictures import draw_all
from tsmoe.report.summary import summarise

FOLDER, PAGE, NUMBERS = "report", "report.html", "report.json"


@dataclass(frozen=True, kw_only=True)
class WrittenReport:
    """A report that was written."""

    page: Path
    summary: dict[str, Any]
    """What `report.json` holds."""


def write_report(run: Path, out: Path | None = None) -> WrittenReport:
    """Read a run's folder and write its report; an older one is replaced.

    Args:
        run: folder of the run, done or not.
        out: folder for the report; by default `report` in that of the run.

    Raises:
        DataError: if it is no run, or no step was recorded yet.
    """
    history = read_run(run)
    summary, pictures = summarise(history), draw_all(history)
    folder = out or run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        _replace(folder / f"{name}.png", content)
    _replace(folder / NUMBERS, f"{json.dumps(summary, indent=1)}\n".encode())
    _replace(folder / PAGE, page(history, summary, pictures).encode())
    return WrittenReport(page=folder / PAGE, summary=summary)


def _replace(path: Path, content: bytes) -> None:
    """Write a file at once, so that a page that is open in a browser is always whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
