"""Keep memory that was freed, where training runs on the CPU.

By default glibc gives large blocks back to the system at once and gets them anew, zeroed page by
page, in every step: activations, gradients, and each of DeepSpeed's flat copies of them.
"""

from __future__ import annotations

import ctypes
import logging

logger = logging.getLogger(__name__)

# Of malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> bool:
    """Have malloc reuse what was freed instead of returning it; say whether it could be told.

    Only glibc can; elsewhere nothing changes. The process then holds its peak until it ends.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logger.info("no mallopt here: freed memory goes back to the system in every step")
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
