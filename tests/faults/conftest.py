"""What fault tests share: a small corpus and run, its losses, and a real SLURM cluster."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launched_run import LONG, launch, losses_of
from small_run import SMALL, build_small_corpus
from tsmoe.config import merge_layers

CLUSTER = Path(__file__).resolve().parents[3] / "shared" / "tools" / "slurm_cluster.sh"


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Give a folder with a corpus and `small.yaml`, the settings of a run on it."""
    folder = tmp_path_factory.mktemp("work")
    corpus = build_small_corpus(folder)
    settings = merge_layers(SMALL, LONG, {"corpus": str(corpus)})
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="session")
def undisturbed(work: Path) -> list[float]:
    """Give the losses of the run by two ranks that nobody disturbs."""
    launch(work, {"ranks_per_node": 2, "threads_per_rank": 1}, "run=undisturbed")
    return losses_of(work / "undisturbed")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Callable[..., str]]:
    """Start a SLURM cluster of two nodes, or skip; what is called runs a command of it."""
    if not CLUSTER.exists():
        pytest.skip(f"no cluster: {CLUSTER.name} is not beside this checkout")
    if os.geteuid() != 0:
        pytest.skip("no cluster: its script must be root")
    was_up = subprocess.run([CLUSTER, "status"], capture_output=True, check=False).returncode == 0
    up = subprocess.run([CLUSTER, "up"], capture_output=True, text=True, check=False, timeout=300)
    if up.returncode:
        pytest.skip(f"no cluster: {up.stderr.strip().splitlines()[-1]}")
    name, _, path = up.stdout.strip().removeprefix("export ").partition("=")
    former, os.environ[name] = os.environ.get(name), path

    def run(*words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    yield run
    if not was_up:
        subprocess.run([CLUSTER, "down"], capture_output=True, check=False, timeout=60)
    if former is None:
        del os.environ[name]
