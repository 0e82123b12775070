"""A rank whose launcher dies alone ends too; a process without a launcher lives on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

# A launcher that starts a rank, says its process id and dies at once.
LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
rank.stdout.readline()
print(rank.pid, flush=True)
os._exit(0)
"""
RANK = """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as a node's wrapper starts them
from tsmoe.launcher_watch import stop_without_launcher
stop_without_launcher(look_every_seconds=0.02)
print("watching", flush=True)
time.sleep(60)
"""


def orphan(environment: dict[str, str]) -> int:
    """Return the process id of a rank whose launcher has died."""
    others = {name: value for name, value in os.environ.items() if name != "RANK"}
    launched = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True,
        env=others | environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=True,
    )  # fmt: skip
    return int(launched.stdout)


def is_alive(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
def test_only_a_rank_ends_with_its_launcher() -> None:
    alone, rank = orphan({}), orphan({"RANK": "0"})
    try:
        deadline = time.monotonic() + 10
        while is_alive(rank):
            assert time.monotonic() < deadline, "the rank lives on"
            time.sleep(0.01)
        assert is_alive(alone)
    finally:
        for process in (alone, rank):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
