"""What one visitor has open and asks for. Runs in the visitor's own process, which `fork_server.py` forks.

Each request returns the parts of the page that it changes, by name: HTML of `showing.py`, or plain values.
"""

import json
import signal
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import keeping
import opening
import showing
import teaching
import uploads
from answering import answer
from PIL import Image
from visits import REQUESTS, Parts

from cl_prompts.cli import EXPECTED
from cl_prompts.runtime.text import first_line


SAMPLES = Path(__file__).resolve().parent / "samples"


class Visitor:
    """The pool and the pictures of one visitor; every method without an underscore is a request.

    Args:
        pool: the visitor's own pool.
        room: folder of the visitor's files.
    """

    def __init__(self, pool: opening.OpenPool, room: Path) -> None:
        self.pool, self.room = pool, room
        self.asked: dict[str, Image.Image] = {}  # pictures to classify, by name
        self.lesson: dict[str, Image.Image] = {}  # pictures of the class to teach, by name
        self.lessons: list[str] = []  # a line on each class taught
        self.tick: teaching.Tick = lambda done, text: None

    def look(self) -> Parts:
        """Everything."""
        offered, why = teaching.ways(self.pool)
        return {
            **self._pool_and_answers(),
            "opened": "",
            "lesson": showing.waiting(self.lesson),
            "way": offered,
            "why": showing.message(why, "hint") if not offered else showing.folded("What the lesson does", why),
            "download": None,
            "samples": self.pool.on_micro_vit,
        }

    def open_digits(self) -> Parts:
        """Open the built-in pool."""
        return self._open(opening.open_digits())

    def open_hub(self, repo_id: str) -> Parts:
        """Open an adapter of the Hub."""
        return self._open(opening.open_hub(repo_id))

    def open_files(self, paths: Sequence[str]) -> Parts:
        """Open an uploaded adapter."""
        return self._open(opening.open_files(paths))

    def _open(self, pool: opening.OpenPool) -> Parts:
        self.pool, self.asked, self.lesson, self.lessons = pool, {}, {}, []
        return self.look() | {"opened": showing.message("The pool is open.")}

    def ask(self, paths: Sequence[str]) -> Parts:
        """Classify uploaded pictures."""
        images, problems = uploads.take_images(paths)
        self.asked = images or self.asked
        return {"asked": showing.messages(problems), "answers": self._answers()}

    def ask_samples(self, kind: str = "digits") -> Parts:
        """Classify the sample pictures of a kind, "digits" or "photographs"."""
        self.asked = _samples(kind)
        return {"asked": "", "answers": self._answers()}

    def lay_out(self, paths: Sequence[str]) -> Parts:
        """Add uploaded pictures to the lesson."""
        images, problems = uploads.take_images(paths, self.lesson)
        if len(self.lesson) + len(images) > uploads.MAX_IMAGES:
            raise ValueError(f"at most {uploads.MAX_IMAGES} pictures teach a class: clear some first")
        self.lesson |= images
        return {"taught": showing.messages(problems), "lesson": showing.waiting(self.lesson)}

    def lay_out_samples(self, name: str) -> Parts:
        """Use sample pictures of a class that the built-in pool has not learned, and set its name."""
        self.lesson = _samples(f"teach-{name}")
        return {"taught": "", "lesson": showing.waiting(self.lesson), "name": name}

    def clear(self) -> Parts:
        """Remove the pictures of the lesson."""
        self.lesson = {}
        return {"taught": "", "lesson": showing.waiting({})}

    def teach(self, name: str, way: str | None) -> Parts:
        """Teach the pool a class, save it, update its answers, and compare them with those before."""
        pictures = {"the pictures of the lesson": self.lesson, "the pictures asked above": self.asked}
        before = {title: self._labels(images) for title, images in pictures.items() if images}
        said = teaching.teach(self.pool, name, list(self.lesson.values()), way or "", self.tick)
        self.lessons.append(said)
        counts = showing.counts({title: (labels, self._labels(pictures[title])) for title, labels in before.items()})
        self.lesson = {}
        file = keeping.packed(self.pool, self.lessons, self.room)
        return {
            **self._pool_and_answers(),
            "taught": showing.message(f"Learned as {said}. Ask again above, or download the new adapter.") + counts,
            "lesson": showing.waiting({}),
            "download": str(file),
        }

    def _pool_and_answers(self) -> Parts:
        return {"facts": showing.facts(self.pool), "record": showing.record(self.pool), "answers": self._answers()}

    def _labels(self, images: dict[str, Image.Image]) -> list[str]:
        """What the pool takes each picture for."""
        return [answer(self.pool, image).labels[0][0] for image in images.values() if self.pool.model.classes]

    def _answers(self) -> str:
        found = [(name, image, answer(self.pool, image)) for name, image in self.asked.items()]
        return showing.answers(self.pool, found)


def _samples(folder: str) -> dict[str, Image.Image]:
    """The sample pictures in a folder under `samples/`, by name."""
    return uploads.take_images(sorted((SAMPLES / folder).iterdir()))[0]


def answered(visitor: Visitor, name: str, arguments: Sequence[Any]) -> Parts:
    """The answer to a request, which after any error is one line.

    Values of strangers may make any code fail. An error that the command would not expect is also printed for the owner of
    the page.
    """
    try:
        parts: Parts = getattr(visitor, name)(*arguments)
        return parts
    except Exception as error:
        said = first_line(error)
        if not isinstance(error, EXPECTED):
            traceback.print_exception(error)
            said = f"this cannot be used ({type(error).__name__}: {said})"
        return {REQUESTS[name].said: showing.message(said, "bad")}


def serve(pipe: Connection, visitor: Visitor) -> None:
    """Answer requests until the page closes the pipe."""
    tempfile.tempdir = str(visitor.room)
    while True:
        try:
            asked = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        visitor.tick = lambda done, text: pipe.send_bytes(json.dumps({"tick": [done, text]}).encode())
        # The signal ends the process, whatever code of C it is in.
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"])
        parts = answered(visitor, asked["name"], asked["arguments"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(json.dumps({"parts": parts, "bytes": own_bytes()}).encode())


def own_bytes() -> int:
    """Memory that only this process uses, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
