"""Keeps memory that a training step frees in the process, for the next step.

By default glibc returns every freed block above 32 MB to the kernel. Activations of 64 images are larger, and allocating
them again took a fifth of a training step on a CPU (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager


# If one of these environment variables is set, the user's settings of malloc are kept.
CHOICES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")

# Parameters of glibc's mallopt(3), and the largest threshold that glibc itself adapts to.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20
_LARGEST_KEPT_BLOCK = 2**30  # larger blocks are returned to the kernel; they are rare
_NEVER = -1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within this context, freed memory stays with the process. At its end, free memory is returned to the system.

    `ContinualTrainer.train` uses it, and other training loops can too. It does not change results. It has no effect without
    glibc, or if one of the environment variables `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_MAX_` and
    `GLIBC_TUNABLES` is set.
    """
    if not _has_glibc() or any(name in os.environ for name in CHOICES):
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def return_freed_memory() -> None:
    """Return freed memory of the process to the system. It has no effect without glibc.

    glibc keeps freed blocks below its threshold, which grows up to 32 MB: after large images these were 190 MB.
    """
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
