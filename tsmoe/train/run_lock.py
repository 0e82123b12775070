"""Keep two trainings from writing into one run folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tsmoe.errors import ConfigError
from tsmoe.ranks import Ranks
from tsmoe.run_folder import LOCK_FILE


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the run folder while training. Collective; the system lets go when the process ends.

    Raises:
        ConfigError: on every rank, if another process holds it. Launchers that are killed alone
            may leave their ranks behind.
    """
    file = None
    is_held = True
    if ranks.is_first:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK_FILE).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_held = False
    if not ranks.gather(is_held)[0]:
        raise ConfigError(
            f"{run}: another process is training there; wait for it or stop all its ranks, or "
            "choose another run="
        )
    try:
        yield
    finally:
        if file is not None:
            file.close()
