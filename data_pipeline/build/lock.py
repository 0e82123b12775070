"""Who may write in the folder of a corpus: one whole build, or several tasks of one.

Locks are the kernel's, so a killed build leaves none behind. A remote store has no locks: there
tasks that are started twice do the same work twice, and write the same bytes.
"""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.errors import ConfigError
from data_pipeline.shards.manifest import BUILDING_FOLDER
from data_pipeline.storage import Store

logger = logging.getLogger(__name__)

LOCK_PREFIX = f"{BUILDING_FOLDER}/lock"


class BuildLock:
    """Held by a build while it writes.

    Args:
        descriptor: open file that the kernel's lock belongs to; None where there are no locks.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def make_exclusive(self) -> None:
        """Shut all others out, when those that are there have ended.

        Each may be the last that ends, and may have looked for the blocks of the others before
        they were there: so none goes before it has waited for those that are still there.
        """
        if self._descriptor is not None and not _lock(self._descriptor, fcntl.LOCK_EX):
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # two that keep theirs wait for ever
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)


@contextmanager
def build_lock(store: Store, task: tuple[int, int]) -> Iterator[BuildLock]:
    """Hold the lock of a corpus folder.

    Args:
        store: the folder.
        task: number of the task and number of all; tasks of several write beside one another,
            each started once.

    Raises:
        ConfigError: if another build is writing there.
    """
    if not store.is_local:
        yield BuildLock(None)
        return
    number, num_tasks = task
    with ExitStack() as stack:
        own = stack.enter_context(_open(store.local_path(f"{LOCK_PREFIX}-{number}-of-{num_tasks}")))
        all_tasks = stack.enter_context(_open(store.local_path(LOCK_PREFIX)))
        try:
            kind = fcntl.LOCK_EX if num_tasks == 1 else fcntl.LOCK_SH
            is_free = _lock(own, fcntl.LOCK_EX) and _lock(all_tasks, kind)
        except OSError as error:
            logger.warning("%s has no file locks (%s): start no task twice", store, error)
            yield BuildLock(None)
            return
        if not is_free:
            raise ConfigError(
                f"--out {store}: another build is writing there; wait for it, or choose another "
                f"--out"
            )
        yield BuildLock(all_tasks)


@contextmanager
def _open(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
