"""How the C library keeps the memory of tensors that were freed.

A training step makes and frees the same large tensors again and again. glibc gives blocks above a
threshold back to the system when they are freed, so that every step would fault them in anew, page
by page.
"""

from __future__ import annotations

import ctypes

# Parameters of glibc's mallopt, see its manual page.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))


def keep_freed_memory() -> bool:
    """Let this process keep freed memory and use it again; True if the C library can do it.

    The resident size then stays at its peak until the process ends. Musl, macOS and Windows have no
    such setting and are left alone.
    """
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return False  # not glibc: the numbers may mean something else
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS)
