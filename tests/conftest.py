"""Settings that every test runs under, and the real data where a checkout has it.

One thread per process, so that ranks of a distributed test do not fight over the cores and sums
come out in the same order; no window for pictures; no network for Hugging Face libraries.
"""

import os
from pathlib import Path

# All of it before the first import of torch or matplotlib, which read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Asking for a GPU must not initialise CUDA here: tests fork their ranks from this process.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS_OF_RANKS = {"distributed", "faults", "parity"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start ranks or need the GPU: nothing should run beside them."""
    tests = REPOSITORY / "tests"
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        starts_ranks = hasattr(getattr(item, "module", None), "run_on_ranks") or (
            item.path.is_relative_to(tests)
            and item.path.relative_to(tests).parts[0] in FOLDERS_OF_RANKS
        )
        if starts_ranks or marks & {"launch", "gpu"}:
            item.add_marker("alone")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tests(tmp_path_factory) -> None:
    """Keep what tests cache out of the user's own cache; processes they start inherit it."""
    os.environ["TSMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Give the folder of real data beside the repository, or skip where there is none."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
