"""Say in one line that another rank is gone, where a collective fails in whatever library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tsmoe.errors import LostRankError, TsmoeError
from tsmoe.ranks import Ranks


@contextmanager
def lost_ranks_named(ranks: Ranks) -> Iterator[None]:
    """Turn the failure of a collective in the body into one line.

    Raises:
        LostRankError: in place of what torch.distributed raises.
    """
    try:
        yield
    except RuntimeError as error:
        is_of_communication = isinstance(error, dist.DistError) or "gloo" in str(error)
        if ranks.size == 1 or isinstance(error, TsmoeError) or not is_of_communication:
            raise
        reason = " ".join(str(error).split()).partition("] ")[2] or str(error)
        raise LostRankError(
            f"another rank is gone or does not answer ({reason[:120]}): it, or its machine, says "
            "why; start the same command again: it resumes from the last checkpoint"
        ) from error
