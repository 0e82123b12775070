"""Leave the exit code of a rank where `tsmoe launch` finds it; nothing heavy is imported."""

from __future__ import annotations

import contextlib
import os


def leave_exit_code(code: int) -> None:
    """Write the code down for `tsmoe launch`: torchrun, in between, makes 1 of whatever it is.

    The first rank that fails says why; the others fail as it is gone, and are not written down.
    """
    path = os.environ.get("TSMOE_EXIT_CODE_FILE")
    if path is not None and code:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(str(code))
