import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource
from tsmoe.host_memory import keep_freed_memory
keeps = {keeps} and keep_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
def use():
    block = ctypes.c_void_p(library.malloc({size}))
    ctypes.memset(block, 1, {size})
    library.free(block)
use()
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(keeps, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""
# Above the 32 MiB from which glibc never keeps a block by itself.
SIZE = 40 << 20


def page_faults(*, keeps: bool) -> tuple[str, int]:
    """In a process of its own, as the setting cannot be taken back."""
    script = FAULTS.format(keeps=keeps, size=SIZE)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    pages = 4 * SIZE // 4096
    assert page_faults(keeps=True) == ("True", pytest.approx(0, abs=pages // 100))
    assert page_faults(keeps=False)[1] > pages // 2


def test_other_libraries_are_left_alone(monkeypatch) -> None:
    import ctypes

    from tsmoe.host_memory import keep_freed_memory

    calls: list[tuple[int, int]] = []

    class Musl:
        def mallopt(self, *arguments: int) -> int:
            calls.append(arguments)
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Musl())
    assert not keep_freed_memory()
    assert calls == []
