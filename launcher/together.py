"""Run several commands at once, and end all of them when one fails."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_SECONDS_TO_END = 30.0


def run_together(commands: Sequence[Sequence[str]]) -> int:
    """Start all commands and wait; returns 0, or the code of the first that failed.

    Each is in a process group of its own; the others get SIGTERM, and SIGKILL half a minute later.
    """
    processes = [subprocess.Popen(list(command), start_new_session=True) for command in commands]
    failed = 0
    while not failed and any(process.poll() is None for process in processes):
        failed = next((p.returncode for p in processes if p.poll()), 0)
        time.sleep(0.2)
    failed = failed or next((p.returncode for p in processes if p.poll()), 0)
    deadline = time.monotonic() + _SECONDS_TO_END
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.2)
    for process in processes:
        process.wait()
    return failed


if __name__ == "__main__":
    sys.exit(run_together([shlex.split(text) for text in sys.argv[1:]]))
