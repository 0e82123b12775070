"""Notice that the launcher died alone, so that its ranks do not train on unseen.

A launcher that is killed (out of memory, `kill -9`) leaves its ranks running under another parent:
nobody waits for them, the job counts as ended, and they hold the run folder and their GPUs.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

logger = logging.getLogger(__name__)

_LOOK_EVERY_SECONDS = 1.0


def stop_without_launcher(*, look_every_seconds: float = _LOOK_EVERY_SECONDS) -> None:
    """From now on send this process SIGTERM when the one that started it has ended.

    Only ranks of a launcher are watched: one process alone may outlive its shell. Before training
    has begun SIGTERM ends the process; from then on it saves and stops as on any other request. To
    be called before anything slow, as a launcher that is dead already cannot be told from another.
    """
    if "RANK" in os.environ:
        watch = threading.Thread(
            target=_watch, args=(os.getppid(), look_every_seconds), name="launcher-watch",
            daemon=True,
        )  # fmt: skip
        watch.start()


def _watch(launcher: int, look_every_seconds: float) -> None:
    while os.getppid() == launcher:
        time.sleep(look_every_seconds)
    logger.warning(
        "rank %s: its launcher (process %d) is gone; stopping, after a save if training has begun; "
        "start the same command again to go on",
        os.environ["RANK"], launcher,
    )  # fmt: skip
    # Ranks may be started with it blocked, and without a launcher nobody would end them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.kill(os.getpid(), signal.SIGTERM)
