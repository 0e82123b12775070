"""Files of a record that a full disk does not end: what cannot be written is left out and told.

A run goes on for days; what it records is worth less than the run. Each kind of file warns once
when it cannot be written, and says what is missing once it can be written again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# A full disk has a few bytes free now and then; it counts as free again from here on.
_BYTES_FREE_AGAIN = 2**20
# Tensorboard's files are opened again after a failure, which is not to be tried at every step.
_SECONDS_BETWEEN_TRIES = 30.0


class Missing:
    """Steps that could not be recorded in one kind of file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: int | None = None
        self._last = 0

    def failed(self, step: int, error: Exception) -> None:
        """Take note of a step; the first one is warned of."""
        if self._first is None:
            self._first = step
            logger.warning(
                "%s: cannot be written (%s); training goes on, and steps from %d on are not "
                "recorded there until some space is free",
                self._path, error, step,
            )  # fmt: skip
        self._last = step

    def lasts(self, step: int) -> bool:
        """Say whether trying again is of no use yet, and take note of the step if so."""
        if self._first is None or shutil.disk_usage(self._path).free >= _BYTES_FREE_AGAIN:
            return False
        self._last = step
        return True

    def ended(self) -> dict[str, int] | None:
        """Return the first and last step that are missing, once; None if none is."""
        if self._first is None:
            return None
        missing = {"from_step": self._first, "to_step": self._last}
        self._first = None
        logger.warning(
            "%s: is written again; steps %d to %d are missing", self._path, *missing.values()
        )
        return missing


class LineFile:
    """Appends lines of JSON; each is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: what a full disk refuses must not be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._missing = Missing(path)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line; after lines that are missing, one that says which."""
        step = values["step"]
        if self._missing.lasts(step):
            return
        try:
            self._append(values)
        except OSError as error:
            self._missing.failed(step, error)
            return
        if missing := self._missing.ended():
            try:
                self._append({"step": step, "missing": missing})
            except OSError as error:
                self._missing.failed(step, error)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _append(self, values: Mapping[str, Any]) -> None:
        line = f"{json.dumps(values)}\n".encode()
        size = self._file.seek(0, 2)
        try:
            # The last bytes of a disk may take a part of the line.
            if self._file.write(line) != len(line):
                raise OSError("no space left for the whole line")
        except OSError:
            with contextlib.suppress(OSError):  # the reason is the failure before
                self._file.truncate(size)
            raise


class Board:
    """Writes tensorboard's events; after a failure it begins another file of events.

    What it can do is called as in torch's writer.
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        """Open a file of events; what was shown from `purge_step` on is shown no more."""
        self._folder = folder
        self._missing = Missing(folder)
        self._tried, self._newest_step = time.monotonic(), purge_step
        self._writer: Any = None  # torch's writer has no types
        self._open(purge_step, purge_step=purge_step)

    def add_scalars(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Write all values of a step as one event: 230 of the tiny preset took 4 ms one by one."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
            if value is not None
        ]
        summary = Summary(value=values)
        self._write(step, lambda writer: writer.file_writer.add_summary(summary, step))

    def add_image(self, tag: str, picture: np.ndarray, step: int, *, dataformats: str) -> None:
        """Show a picture."""
        self._write(
            step, lambda writer: writer.add_image(tag, picture, step, dataformats=dataformats)
        )

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""
        self._write(step, lambda writer: writer.add_text(tag, text, step))

    def add_custom_scalars(self, layout: Mapping[str, Any]) -> None:
        """Say which charts tensorboard is to draw."""
        self._write(self._newest_step, lambda writer: writer.add_custom_scalars(layout))

    def flush(self) -> None:
        """Push what was added to the disk."""
        self._write(self._newest_step, lambda writer: writer.flush())

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            _abandon(self._writer)

    def _write(self, step: int, action: Callable[[Any], object]) -> None:
        self._newest_step = step
        if self._writer is None:
            is_too_soon = time.monotonic() - self._tried < _SECONDS_BETWEEN_TRIES
            if self._missing.lasts(step) or is_too_soon:
                self._missing.failed(step, OSError("not tried again yet"))
                return
            self._open(step)
            if self._writer is None:
                return
        try:
            action(self._writer)
        except OSError as error:
            self._give_up(step, error)

    def _open(self, step: int, *, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._tried = time.monotonic()
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
            self._writer.flush()
        except OSError as error:
            self._give_up(step, error)
            return
        self._missing.ended()

    def _give_up(self, step: int, error: OSError) -> None:
        """Let go of a writer whose thread has ended with an error."""
        self._missing.failed(step, error)
        self._tried = time.monotonic()
        writer, self._writer = self._writer, None
        if writer is not None:
            _abandon(writer)


def _abandon(writer: Any) -> None:
    # Closing writes what is left, which a full disk refuses once more.
    with contextlib.suppress(OSError):
        writer.close()
