"""Freed memory stays with the process: a block of the same size comes back without page faults."""

import resource

import torch

from rank_pool import run_on_ranks
from tsmoe.engine.host_memory import keep_freed_memory

BLOCK = 16 * 2**20  # numbers of 4 bytes: far above any threshold of malloc
PAGES = BLOCK * 4 // 4096


def faults_of_reuse() -> tuple[int, bool, int]:
    """Count page faults of a block that is used, freed and used again; before and after."""
    before = _faults()
    is_kept = keep_freed_memory()
    _use()
    return before, is_kept, _faults()


def _use() -> None:
    torch.empty(BLOCK).fill_(1.0)


def _faults() -> int:
    _use()
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _use()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun


def test_freed_memory_is_reused_without_page_faults() -> None:
    """In a process of its own, as the setting stays."""
    ((before, is_kept, after),) = run_on_ranks(faults_of_reuse, num_ranks=1)
    if not is_kept:
        assert after == before or after > PAGES / 2  # another C library: nothing promised
        return
    # Pages may be large ones, of which there are fewer; but some there are.
    assert before > 10 * max(after, 1)
