"""The memory allocator of the C library."""

from __future__ import annotations

import ctypes
import sys

# Constants of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT = 1 << 30  # bytes of freed memory at the end of the heap before any of it goes back to the system


def keep_freed_memory() -> bool:
    """Keep freed memory in this process; return whether the C library is glibc, which alone can do so.

    By default glibc returns large freed blocks to the system and gets new, zeroed pages for the next allocation. Every
    layer frees and allocates activations, and their pages can cost more time than the arithmetic. BDPO with batch size
    4096 takes 3.1 s per step instead of 4.3; the peak of memory is 4.4 GB instead of 4.2.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, KEPT))
