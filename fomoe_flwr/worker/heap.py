"""The C library's heap: whether it keeps what a training step frees.

glibc maps every tensor above 32 MiB on its own and unmaps it when it is freed, and it gives the end
of the heap back whenever enough of it is free. So each step asks the kernel for the same pages
again, zeroed one by one: a tenth of a step's time on a CPU. A heap that is held keeps them until
`release_heap`. It is the main thread's; other threads have small heaps of their own.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def hold_heap() -> bool:
    """Keep freed memory in this process from now on; return whether the C library can.

    There is no way back: once set, glibc's own moving thresholds stay off for this process.
    """
    libc = _glibc()
    return libc is not None and all(
        libc.mallopt(parameter, value) == 1
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    )


def release_heap() -> None:
    """Give all freed memory back to the system, whether the heap is held or not."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def prefer_large_pages() -> None:
    """Let torch ask the system for large pages, where a GPU computes the steps.

    Host memory then holds whole models, and to fill new memory costs several times less. To be
    called before torch is used.
    """
    if Path("/proc/driver/nvidia").exists():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def held_heap(is_held: bool) -> Iterator[None]:
    """Hold the heap, and release it at the end; with False do nothing."""
    if is_held:
        hold_heap()
    try:
        yield
    finally:
        if is_held:
            release_heap()
