"""Which files of a folder were opened, and how often, by anybody: Python, safetensors' Rust, another library."""

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


IN_OPEN, IN_CLOSE, IN_ISDIR = 0x20, 0x18, 0x40000000  # of Linux's <sys/inotify.h>
HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name


@contextmanager
def counted_opens(folder: Path) -> Iterator[Counter[str]]:
    """The counter is filled when the block ends; names are those of files in the folder itself."""
    found: Counter[str] = Counter()
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        # The system merges equal events that follow each other, so closing is watched, too.
        watched = libc.inotify_add_watch(descriptor, os.fsencode(folder), IN_OPEN | IN_CLOSE)
        assert watched >= 0, os.strerror(ctypes.get_errno())
        yield found
        try:
            while events := os.read(descriptor, 2**16):
                while events:
                    _, mask, _, length = HEADER.unpack_from(events)
                    name, events = events[HEADER.size : HEADER.size + length], events[HEADER.size + length :]
                    if mask & IN_OPEN and not mask & IN_ISDIR:
                        found[name.rstrip(b"\0").decode()] += 1
        except BlockingIOError:  # no more events
            pass
    finally:
        os.close(descriptor)
