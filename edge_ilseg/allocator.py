"""Freed memory is kept by the process that trains, in place of being given back and asked for again in each iteration.

1. glibc takes a large block from the system and gives it back when it is freed: each of a network's activations is new
   memory then, which the system fills with zeros page by page, in every iteration again. That is up to two fifths of an
   iteration on a CPU. After `keep_freed_memory` all blocks come from its heap, which keeps them.
2. It holds for the whole process and cannot be taken back; `give_back_memory` returns what is free at the moment.
3. Who has set glibc's allocator by its environment variables has chosen: nothing is changed then. Another allocator, or
   another C library, is left alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
KEPT_BYTES = 2**31 - 1
"""The end of the heap is given back when more than that is free there; as much as the call can say."""
CHOICES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """Let this process keep what it frees (rule 1); whether it does. A second call changes nothing."""
    return not any(environment.get(name) for name in CHOICES) and _set_options()


def give_back_memory() -> None:
    """Return the heap's free pages to the system, after training (rule 2)."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None


@functools.cache
def _set_options() -> bool:
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
