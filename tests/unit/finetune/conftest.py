"""A table and a package in a folder, and runs over them that are only laid out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_run import small_finetune, write_package, write_table
from tsmoe.finetune.config import FinetuneRun
from tsmoe.finetune.start import open_start, resolve_run
from tsmoe.finetune.table import SplitTable, open_table
from tsmoe.finetune.windows import context_rows

Laid = Callable[..., tuple[FinetuneRun, SplitTable]]


@pytest.fixture(scope="session", name="folder")
def folder_of_inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_table(folder / "table.csv", gaps=True)
    write_package(folder / "package")
    return folder


@pytest.fixture
def lay_out(folder) -> Laid:
    def lay_out(*settings: dict) -> tuple[FinetuneRun, SplitTable]:
        config = small_finetune(
            folder / "run", folder / "table.csv", *settings, start=folder / "package"
        )
        run = resolve_run(config, open_start(config.start))
        return run, open_table(config.table, context_length=context_rows(run))

    return lay_out
