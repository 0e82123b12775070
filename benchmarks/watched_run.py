"""Start a run on two ranks, see what it is doing, kill some of it, and see what is left."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from runs import environment
from tsmoe.checkpoint.layout import find_damage, read_meta, step_folders
from tsmoe.errors import CheckpointError

_POLL_SECONDS = 0.01


class RunWatch:
    """What a run folder tells of the start of a run that writes into it."""

    def __init__(self, run: Path, *, validate_every_steps: int) -> None:
        """Look at what earlier starts left, so that new lines are known for such."""
        self.run, self._validate_every_steps = run, validate_every_steps
        self._inode, self._offset, self._rest = 0, 0, b""
        self._last: dict[str, Any] = {}
        self._starts: set[str] = set()
        self._earlier: set[str] = set()
        self.first_step: int | None = None
        """First step that this start recorded; None before that."""
        self.begins_at = 0.0
        """When that was seen, by the monotonic clock."""
        self.last_step = -1
        """Last step on record."""
        self.look()
        self._earlier = self._starts.copy()
        self.first_step = None

    def look(self) -> None:
        """Read what was added to metrics.jsonl."""
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:  # cut back: written anew and renamed
                    self._inode, self._offset, self._rest = inode, 0, b""
                    self.last_step, self._last, self._starts = -1, {}, set()
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return
        self._offset += len(added)
        *whole, self._rest = (self._rest + added).split(b"\n")
        for line in whole:
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return  # cut short by a kill
        self._last = values
        if "loss/train" in values:
            self.last_step = values["step"]
        if "speed/start" in values:
            # The times in it make the line one of its kind.
            text = line.decode()
            self._starts.add(text)
            if text not in self._earlier:
                self.first_step, self.begins_at = values["step"], time.monotonic()

    def has_begun(self) -> bool:
        """Look whether this start has done a step."""
        self.look()
        return self.first_step is not None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was and waits to be made visible."""
        folder = self.run / "checkpoints"
        return self.first_step is not None and any(folder.glob(".incomplete-*"))

    @property
    def is_validating(self) -> bool:
        """Whether a step is on record after which the run validates, and its result is not."""
        if self.first_step is None or "loss/train" not in self._last:
            return False
        return (self.last_step + 1) % self._validate_every_steps == 0

    def phase(self) -> str:
        """Say what the run is doing now."""
        self.look()
        if (self.run / "DONE").exists():
            return "exit"
        if self.first_step is None:
            return "load"
        if self.is_saving:
            return "save"
        return "evaluation" if self.is_validating else "step"


class Launch:
    """A launcher and its ranks. Use as a context manager: nothing of it is left behind."""

    def __init__(self, command: list[str], run: Path, log: Path) -> None:
        self.run = run
        self.begun = time.monotonic()
        with log.open("wb") as file:
            self._launcher = subprocess.Popen(
                command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, env=environment(),
            )  # fmt: skip

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.sweep()
        self._launcher.wait()

    @property
    def has_ended(self) -> bool:
        """Whether the launcher has ended; its ranks may not have."""
        return self._launcher.poll() is not None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the launcher; None while it runs."""
        return self._launcher.poll()

    def wait_for(self, is_so: Callable[[], bool], *, seconds: float) -> bool:
        """Wait until something is so; False if the launcher ended before, or time is up."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if self.has_ended or time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def look_on(self, watch: RunWatch, *, seconds: float) -> None:
        """Look on for some seconds, or until the launcher ends."""

        def never() -> bool:
            watch.look()
            return False

        self.wait_for(never, seconds=seconds)
        watch.look()

    def kill(self, victim: str) -> list[str]:
        """Send SIGKILL to `rank 0`, `rank 1`, `both ranks`, the `launcher`, or `all`.

        Before there are ranks there is only the launcher to kill. Returns who was.
        """
        found = self._processes()
        ranks = [process for name, process in found.items() if name != "launcher"]
        if victim == "all" or not ranks:
            doomed = list(found)
        elif victim == "both ranks":
            doomed = [name for name in found if name != "launcher"]
        else:
            doomed = [victim] if victim in found else []
        for name in doomed:
            with suppress(psutil.NoSuchProcess):
                found[name].kill()
        return doomed

    def wait_until_gone(self, *, seconds: float) -> tuple[float, int]:
        """Wait until no process is left; return the seconds, and how many had to be killed."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            self._launcher.poll()
            if not processes_of(self.run):
                return time.monotonic() - begun, 0
            time.sleep(0.02)
        return time.monotonic() - begun, self.sweep()

    def sweep(self) -> int:
        """Kill what is left and return how many processes that were."""
        return sweep(self.run)

    def _processes(self) -> dict[str, psutil.Process]:
        found = {}
        for process in processes_of(self.run):
            with suppress(psutil.Error):
                is_launcher = process.pid == self._launcher.pid
                rank = "" if is_launcher else process.environ().get("RANK", "?")
                found["launcher" if is_launcher else f"rank {rank}"] = process
        return found


def processes_of(run: Path) -> list[psutil.Process]:
    """Find the processes that were started with this run's folder."""
    setting = f"run={run}"
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if setting in process.cmdline():  # a zombie has none
                found.append(process)
    return found


def sweep(run: Path) -> int:
    """Kill the processes that were started with this run's folder."""
    left = processes_of(run)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    return len(left)


def checkpoint_hashes(run: Path) -> dict[int, dict[str, str] | None]:
    """Hash the files of each visible checkpoint, by step; None for one that is not whole."""
    found: dict[int, dict[str, str] | None] = {}
    for folder in step_folders(run / "checkpoints"):
        step = int(folder.name.removeprefix("step_"))
        try:
            meta = read_meta(folder)
        except CheckpointError:
            found[step] = None
            continue
        hashes = {file.name: file.sha256 for file in meta.files}
        found[step] = hashes if find_damage(folder, meta) is None else None
    return found
