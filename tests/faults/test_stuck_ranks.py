"""Ranks that are told to stop, that hang, or that wait for one that does; real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from small_run import SMALL, build_small_corpus
from tsmoe.config import merge_layers

pytestmark = pytest.mark.launch

TIMEOUT = 120
LAUNCHER_SIGNALS = {signal.SIGTERM, signal.SIGUSR1}

# The program, with a data worker of the first rank that never comes back from a read.
HANGING = """
import os, sys, time
from tsmoe.__main__ import main
from tsmoe.data.loader import TrainingBatches
real = TrainingBatches.__getitem__
def read(self, item):
    if item >= 8 and os.environ["RANK"] == "0":
        time.sleep(1000)
    return real(self, item)
TrainingBatches.__getitem__ = read
sys.exit(main())
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stuck")
    endless = {
        "corpus": str(build_small_corpus(folder)),
        "training": {"steps": 100_000, "validate_every_steps": 100_000},
        # None: a rank that waits within a save is not cut short.
        "checkpoint": {"every_steps": 100_000},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merge_layers(SMALL, endless)))
    return path


@contextmanager
def started(program: list[str], *settings: str, num_ranks: int) -> Iterator[list[subprocess.Popen]]:
    """Start ranks as the node wrapper does, with the signals of a launcher blocked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *program, "pretrain", *settings],
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, LAUNCHER_SIGNALS),
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            | {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )
        for rank in range(num_ranks)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_steps(run: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + TIMEOUT
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("loss/train") < 5:
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_that_came_before_a_handler_stood_leads_to_save_and_stop(
    config_file, tmp_path, number
) -> None:
    settings = [str(config_file), f"run={tmp_path}"]
    with started(["-m", "tsmoe"], *settings, num_ranks=1) as (process,):
        time.sleep(0.2)  # still importing
        process.send_signal(number)
        _, log = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 75, log
    assert (tmp_path / "REQUEUE").read_text() == "1\n"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000001"


def test_rank_that_waits_for_a_hanging_one_ends_itself_when_asked_to_stop(
    config_file, tmp_path
) -> None:
    settings = [str(config_file), f"run={tmp_path}", "training.stop_seconds=2"]
    with started(["-m", "tsmoe"], *settings, num_ranks=2) as (first, second):
        wait_for_steps(tmp_path, [first, second])
        second.send_signal(signal.SIGSTOP)
        time.sleep(1)
        first.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        time.sleep(0.5)
        first.send_signal(signal.SIGTERM)  # a launcher may send it again
        _, log = first.communicate(timeout=TIMEOUT)
        seconds = time.monotonic() - asked
    assert first.returncode == 1, log
    # Steps took a fraction of a second: those two seconds count, not the 60 of a collective.
    assert 1.5 < seconds < 15
    (line,) = re.findall(r".*asked to stop.*", log)
    assert "the step does not end: another rank may be gone" in line
    assert "Traceback" not in log
    assert not (tmp_path / "REQUEUE").exists()


def test_hung_data_worker_ends_all_ranks_with_one_line_each(config_file, tmp_path) -> None:
    limit = 10
    settings = [
        str(config_file), f"run={tmp_path}", f"training.timeout_seconds={limit}",
        "data.num_workers=1",
    ]  # fmt: skip
    with started(["-c", HANGING], *settings, num_ranks=2) as processes:
        wait_for_steps(tmp_path, processes)
        begun = time.monotonic()
        logs = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        seconds = time.monotonic() - begun
    assert [process.returncode for process in processes] == [3, 1], logs
    assert seconds < 3 * limit
    for log in logs:
        assert "Traceback" not in log
    assert re.search(
        r"^tsmoe: .*batch 8 was not read within 9 s; check that the storage", logs[0], re.M
    )
    assert re.search(r"^tsmoe: rank 1: another rank is gone or does not answer", logs[1], re.M)


def test_killed_rank_ends_the_others_at_once_with_one_line(config_file, tmp_path) -> None:
    settings = [str(config_file), f"run={tmp_path}"]
    with started(["-m", "tsmoe"], *settings, num_ranks=2) as (first, second):
        wait_for_steps(tmp_path, [first, second])
        second.kill()
        begun = time.monotonic()
        _, log = first.communicate(timeout=TIMEOUT)
        seconds = time.monotonic() - begun
    assert first.returncode == 1, log
    assert seconds < 20
    assert re.search(r"^tsmoe: another rank is gone or does not answer", log, re.MULTILINE), log
    assert "Traceback" not in log
