"""Runs that are made up."""

from collections.abc import Callable
from pathlib import Path

import pytest

from status_run import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run under a name, by default `run`."""

    def make(name: str = "run", **settings: object) -> Path:
        return write_run(tmp_path / name, **settings)

    return make
