"""Keeps the memory that a training step frees, so that the next step need not ask the kernel for it again.

glibc gives every block above 32 MB back at once. The activations of 64 images are such blocks, and a fifth of a step on a
CPU went into getting their pages again (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager


# With any of these in the environment somebody has chosen already.
CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")

# Parameters of glibc's mallopt(3), and the threshold that its own adaptation ends with at most.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_KEPT_UP_TO = 2**30  # a block above is asked for so rarely that it may go back
_NEVER = -1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within it, memory that the process frees stays with it; afterwards what is free goes back to the system.

    `ContinualTrainer.train` works in it; a training loop of one's own can. The same numbers come out. Does nothing without
    glibc, or where the environment has one of `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_` and
    `GLIBC_TUNABLES`.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in CHOICES):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _KEPT_UP_TO)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)
