"""Carry a plan out: hand its jobs to the queue, or start them here and keep them going."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import psutil

from launcher.backends import slurm
from launcher.environment import EXIT_CODE_VARIABLE
from launcher.errors import LaunchError
from launcher.node import block_signals
from launcher.plan import PlannedStart
from launcher.supervise import START_AGAIN, STOP_NOTE, RestartConfig, begin, end

logger = logging.getLogger(__name__)


def write_files(start: PlannedStart) -> None:
    """Write what a job reads when it starts.

    Raises:
        LaunchError: if that cannot be done.
    """
    for path, text in start.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"{path}: cannot be written ({error.strerror})") from error


def submit_all(starts: Sequence[PlannedStart]) -> dict[str, str]:
    """Hand jobs to the queue in their order and return their numbers by name.

    Raises:
        LaunchError: if one is refused; it names those that are in the queue already.
    """
    numbers: dict[str, str] = {}
    for start in starts:
        write_files(start)
        try:
            numbers[start.job.name] = slurm.submit(start, numbers)
        except LaunchError as error:
            if not numbers:
                raise
            queued = " ".join(numbers.values())
            raise LaunchError(f"{error}; submitted before it: scancel {queued}") from error
    return numbers


def run_all(starts: Sequence[PlannedStart], limits: RestartConfig) -> int:
    """Run jobs here, one after the other; the first that fails ends it with its exit code."""
    for start in starts:
        write_files(start)
        code = _run(start, limits)
        if code:
            return code
    return 0


def _run(start: PlannedStart, limits: RestartConfig) -> int:
    """Run one job; a training that ended too early is started again from its newest checkpoint."""
    if start.job.run is None:
        return _once(start, lambda group: os.killpg(group, signal.SIGTERM)).code
    run = Path(start.job.run)
    restart = 0
    while True:
        begin(run, job=None, restart=restart, limits=limits)
        # Launchers put ranks into groups of their own, or on other machines: no signal is sure to
        # reach them, and the note is.
        ended = _once(start, lambda _: (run / STOP_NOTE).touch())
        nodes = start.hosts or [os.uname().nodename]
        record = end(run, exit_code=ended.code, nodes=nodes, limits=limits)
        if record.outcome == "done":
            return 0
        if ended.was_asked or record.decision == "none":
            return START_AGAIN if record.outcome == "stopped" else ended.code or 1
        if record.decision != "restart":
            logger.error("%s: given up: %s", run, record.reason)
            return ended.code or 1
        logger.warning("%s: starting again: %s", run, record.reason)
        restart += 1


@dataclass(frozen=True)
class _Ended:
    code: int
    was_asked: bool
    """Whether somebody asked for the end."""


def _once(start: PlannedStart, ask: Callable[[int], None]) -> _Ended:
    """Start a job's processes in a group of their own and wait for them.

    Args:
        start: what to start.
        ask: asks the process group to end; called at the first signal. At the second all processes
            are killed.
    """
    with tempfile.TemporaryDirectory(prefix="tsmoe-") as folder:
        told = Path(folder) / "exit_code"
        ended = _wait_for(start, ask, {EXIT_CODE_VARIABLE: str(told)})
        # Empty: the rank was killed as it wrote.
        if ended.code and told.exists() and (code := told.read_text(encoding="utf-8")):
            return replace(ended, code=int(code))
        return ended


def _wait_for(
    start: PlannedStart, ask: Callable[[int], None], variables: Mapping[str, str]
) -> _Ended:
    asked = 0
    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    if start.job.run is not None:
        block_signals()  # launchers would end of them; the ranks undo it when they can take them
    try:
        process = psutil.Popen(
            start.argv,
            env={**os.environ, **start.environment, **variables},
            cwd=start.folder,
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchError(
            f"{start.argv[0]}: cannot be started ({error.strerror}); is it installed here?"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            ask(process.pid)
            return
        for found in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                found.kill()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    former = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        code = process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _clear_group(process.pid)
    return _Ended(code if code >= 0 else 128 - code, asked > 0)


def _clear_group(group: int) -> None:
    """End what a launcher that was killed left behind: nobody else would."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    print("tsmoe launch: ended processes that their launcher left behind", file=sys.stderr)
