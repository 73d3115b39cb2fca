"""Visits: the work of each visitor runs in a process of its own, with limits of time and memory.

A thread cannot be ended while it matches a regular expression or multiplies matrices, and it would hold the other visitors
up. A process can: the visit is over then, and the page goes on.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple


MINUTES = 30  # a visit is kept this long after its last use
MAX_VISITS = 64
MAX_BYTES = 4 * 2**30  # of all visits together
PATIENCE = 1.0  # seconds that a request waits for the visitor's last one
SPARE = 5.0  # seconds in which a process that is out of time ends

ENDED = f"This visit ended: a pool is kept for {MINUTES} minutes after its last use. Reload the page."
DROPPED = "This visit ended to make room for other visitors. Reload the page."
STOPPED = "This took too much time or memory and was stopped, and the visit with it. Reload the page."
BUSY = "The last request is still being worked on: wait for its answer."

Parts = dict[str, Any]  # of the page, by name
Tick = Callable[[float, str], None]


class Request(NamedTuple):
    """A method of `Visitor` that the page may call.

    Args:
        said: the part of the page that shows its messages.
        seconds: after which its process is ended.
    """

    said: str
    seconds: float = 30.0


REQUESTS = {
    "look": Request("opened"),
    "open_digits": Request("opened"),
    "open_hub": Request("opened", 180.0),
    "open_files": Request("opened", 180.0),
    "ask": Request("asked", 60.0),
    "ask_samples": Request("asked"),
    "lay_out": Request("taught", 60.0),
    "lay_out_samples": Request("taught"),
    "clear": Request("taught"),
    "teach": Request("taught", 240.0),
}


class VisitEnded(Exception):
    """The visit is over; the message says why."""


class Visit:
    """A visitor's process, and the folder for its files.

    Args:
        pipe: to the process; requests and answers are JSON.
        room: the folder; it is removed when the visit ends.
    """

    def __init__(self, pipe: Connection, room: Path) -> None:
        self.room = room
        self.used = time.monotonic()
        self.bytes = 0  # of memory that only this process uses
        self.ended: str | None = None  # why
        self._pipe = pipe
        self._turn = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether a request is being worked on."""
        return self._turn.locked()

    def request(self, name: str, *arguments: Any, tick: Tick = lambda done, text: None) -> Parts:
        """The parts of the page that a request changes.

        Args:
            name: one of `REQUESTS`.
            arguments: of that method.
            tick: called with the progress from 0 to 1 and the name of the current step.

        Raises:
            VisitEnded: the visit is over, perhaps because of this request.
            ValueError: the visitor's last request is not answered yet.
        """
        if not self._turn.acquire(timeout=PATIENCE):
            raise ValueError(BUSY)
        try:
            if self.ended is not None:
                raise VisitEnded(self.ended)
            return self._answer(name, arguments, tick)
        except (OSError, EOFError) as error:
            self.ended = STOPPED
            raise VisitEnded(STOPPED) from error
        finally:
            self.used = time.monotonic()
            if self.ended is not None:
                self._close()
            self._turn.release()

    def _answer(self, name: str, arguments: Sequence[Any], tick: Tick) -> Parts:
        seconds = REQUESTS[name].seconds  # the process ends itself after them
        late = time.monotonic() + seconds + SPARE
        self._pipe.send_bytes(json.dumps({"name": name, "arguments": arguments, "seconds": seconds}).encode())
        while self._pipe.poll(max(0.0, late - time.monotonic())):
            answer = json.loads(self._pipe.recv_bytes())
            if "tick" not in answer:
                self.bytes = answer["bytes"]
                parts: Parts = answer["parts"]
                return parts
            tick(*answer["tick"])
        raise EOFError

    def end(self, why: str = ENDED) -> None:
        """End the visit; a request that is being worked on is answered first."""
        self.ended = self.ended or why
        if self._turn.acquire(blocking=False):
            self._close()
            self._turn.release()

    def _close(self) -> None:
        self._pipe.close()  # the process then ends
        shutil.rmtree(self.room, ignore_errors=True)


class Visits:
    """All visits of the page.

    Args:
        place: folder for the folders of the visits.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._open: list[Visit] = []
        self._lock = threading.Lock()
        self._fork_server, other = socket.socketpair()
        with other:
            command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(other.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], start_new_session=True)
        if not self._fork_server.recv(1):  # it is ready
            raise RuntimeError("fork_server.py ended: what it printed says why")

    def start(self) -> Visit:
        """A new visit."""
        room = Path(tempfile.mkdtemp(prefix="visit-", dir=self.place))
        pipe, other = Pipe()
        with other, self._lock:
            socket.send_fds(self._fork_server, [os.fsencode(room)], [other.fileno()])
            visit = Visit(pipe, room)
            self._open.append(visit)
        self.make_room()
        return visit

    def make_room(self) -> None:
        """End the visits that were not used for the longest time, while they are too many or hold too much memory."""
        with self._lock:
            self._open = [visit for visit in self._open if visit.ended is None]
            count, held = len(self._open), sum(visit.bytes for visit in self._open)
            idle = sorted((visit for visit in self._open if not visit.busy), key=lambda visit: visit.used)
            for visit in idle[:-1]:  # the newest one stays
                if count <= MAX_VISITS and held <= MAX_BYTES:
                    break
                visit.end(DROPPED)
                count, held = count - 1, held - visit.bytes

    def end(self) -> None:
        """End all processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._fork_server.close()
        for visit in self._open:
            visit.end()
