"""Files that are whole or not there: a temporary name, fsync, rename, fsync of the folder."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import DataError

PARTIAL_SUFFIX = ".partial"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def durable_file(path: Path, num_bytes: int) -> Iterator[Path]:
    """Give the temporary name to write to; on success it becomes `path`, else it is removed.

    Args:
        path: final name.
        num_bytes: size that is about to be written, for the message.

    Raises:
        DataError: if the disk is full or the file cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        # Two names of one file stay two names when one is renamed to the other.
        partial.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_full(error):
            raise DataError(
                f"{path}: the disk is full, {num_bytes} bytes did not fit; free space or choose "
                f"another folder, then start again"
            ) from error
        raise DataError(f"{path}: cannot be written ({error}); check the folder") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file or the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Tell a full disk or quota from other failures."""
    return error.errno in _FULL
