"""What watches a load: files, processes and imports, time and memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.paths import ROOT


PLANTED = "planted_code"  # a module on sys.path that leaves a mark when it is imported
FORBIDDEN = ("pickle.", "os.", "subprocess.", "socket.", "shutil.", "ctypes.dlopen", "ftplib.", "urllib.", "code.")
HARMLESS = ("os.listdir", "os.scandir", "os.fwalk", "os.walk")
READABLE = tuple(
    os.path.realpath(path)
    for path in {*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev"}
)


class Watch:
    """An audit hook, armed while a load runs: no pickle, no process, no socket, no file outside the adapter's folder.

    Python code that a lazy import reads lies where Python and its packages lie, and in this project.
    """

    def __init__(self) -> None:
        self.room: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._heard)  # for as long as the process lives

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if self.room is None:
            return
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            project = str(ROOT)
            if path.startswith(self.room) and not writes:
                return
            if (writes and not path.endswith(".pyc")) or not path.startswith((*READABLE, project)):
                self.seen.append(f"open {path}")
        elif (event == "import" and PLANTED in str(args[0])) or (event.startswith(FORBIDDEN) and event not in HARMLESS):
            self.seen.append(f"{event} {args!r:.200}")

    @contextmanager
    def armed(self, room: Path) -> Iterator[None]:
        self.room, self.seen = os.path.realpath(room), []
        try:
            yield
        finally:
            self.room = None


@contextmanager
def planted(room: Path) -> Iterator[Path]:
    """A module that can be imported; the mark that it would leave."""
    mark = room / "mark"
    (room / f"{PLANTED}.py").write_text(f"open({str(mark)!r}, 'w').close()\nPlanted = dict\n")
    sys.path.insert(0, str(room))
    try:
        yield mark
    finally:
        sys.path.remove(str(room))
    assert PLANTED not in sys.modules
    assert not mark.exists()


SECONDS = 5
ROOM = 512 * 2**20  # bytes of address space that a load may ask for; the adapters have some thousands


@contextmanager
def bounded(room: int = ROOM) -> Iterator[None]:
    """No more than 5 seconds of this process's time, a minute of anybody's, and no more address space than `room`."""

    def late(*_: Any) -> None:
        raise AssertionError("the load hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, limits[1]))
    signal.alarm(60)
    start = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < SECONDS


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """How far the memory of this process rose above what it was at the start, in bytes."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    start = status("VmRSS")
    yield lambda: status("VmHWM") - start
