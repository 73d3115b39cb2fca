"""The page's visits: processes of their own, their limits, and that any error is a line."""

import html
import resource
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opening
import pytest
import uploads
import visitor
import visits
from transformers import ViTModel

from cl_prompts import VPTConfig, get_prompt_pool_model


CLOSED_FORM = "Closed form, nothing is trained"


@pytest.fixture(scope="module")
def all_visits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[visits.Visits]:
    found = visits.Visits(tmp_path_factory.mktemp("visits"))
    yield found
    found.end()
    assert not list(found.place.iterdir())


@pytest.fixture
def visit(all_visits: visits.Visits) -> Iterator[visits.Visit]:
    found = all_visits.start()
    yield found
    found.end()
    assert not found.room.exists()


@pytest.fixture(scope="module")
def large_matrix(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of an adapter, 40 MB, whose answers compare 80,000 prompts with each other, which takes minutes."""
    folder = tmp_path_factory.mktemp("large")
    base = ViTModel.from_pretrained(opening.MICRO_VIT, add_pooling_layer=False)
    length = 40 * 2**20 // (4 * base.config.hidden_size)
    model = get_prompt_pool_model(base, VPTConfig(prompt_length=length))
    model.begin_task([0])
    model.end_task()
    model.save_pretrained(folder)
    return [str(folder / name) for name in ("adapter_config.json", "adapter_model.safetensors")]


@pytest.mark.slow
def test_a_visit_teaches_and_keeps_the_newest_zip(visit: visits.Visit, all_visits: visits.Visits) -> None:
    ticks: list[float] = []
    assert "Hash" in visit.request("look")["facts"]
    for name in ("eight", "another", "a third"):
        assert visit.request("lay_out_samples", "8")["name"] == "8"
        parts = visit.request("teach", name, CLOSED_FORM, tick=lambda done, text: ticks.append(done))
        assert name in parts["facts"]
        assert [file for file in visit.room.rglob("*") if file.is_file()] == [Path(parts["download"])]
    assert ticks[-1] == 1
    other = all_visits.start()
    assert "eight" not in other.request("look")["facts"]
    other.end()


@pytest.mark.slow
def test_work_without_end_is_cut_off_and_holds_nobody_up(
    visit: visits.Visit, all_visits: visits.Visits, large_matrix: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(visits.REQUESTS, "ask_samples", visits.Request("asked", 4.0))
    hostile, told = all_visits.start(), list[str]()
    assert "The pool is open" in hostile.request("open_files", large_matrix)["opened"]

    def ask() -> None:
        try:
            hostile.request("ask_samples")
        except visits.VisitEnded as error:
            told.append(str(error))

    asking = threading.Thread(target=ask)
    started = time.monotonic()
    asking.start()
    visit.request("look")
    answered = 0
    while asking.is_alive():
        began = time.monotonic()
        assert visit.request("ask_samples")["answers"].count("<article") == 10
        answered += time.monotonic() - began < 2
    assert told == [visits.STOPPED]
    assert 3 < time.monotonic() - started < 4 + visits.SPARE
    assert answered >= 1
    assert not hostile.room.exists()
    with pytest.raises(visits.VisitEnded, match="too much time or memory"):
        hostile.request("look")


@pytest.mark.slow
def test_memory_without_end_is_refused_and_holds_nobody_up(
    visit: visits.Visit, all_visits: visits.Visits, large_matrix: list[str]
) -> None:
    """The limit of a visitor's process is lowered, so that the machine that runs the test need not have 3 GiB."""
    visit.request("look")
    server = all_visits._process.pid  # the processes of the visitors are its children
    before = children(server)
    hostile = all_visits.start()
    assert "The pool is open" in hostile.request("open_files", large_matrix)["opened"]
    (process,) = children(server) - before
    at_start = data_bytes(server)
    assert resource.prlimit(process, resource.RLIMIT_DATA)[0] == pytest.approx(at_start + 3 * 2**30, abs=2**28)
    lower = data_bytes(process) + 2**27
    resource.prlimit(process, resource.RLIMIT_DATA, (lower, lower))
    parts = hostile.request("ask_samples")
    assert "memory" in parts["asked"]
    assert parts["asked"].count('class="message bad"') == 1
    assert "<article" not in parts.get("answers", "")
    assert "Hash" in hostile.request("open_digits")["facts"]  # the visit itself goes on
    assert visit.request("ask_samples")["answers"].count("<article") == 10
    hostile.end()


def children(process: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


def data_bytes(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData:"))


@pytest.mark.slow
def test_a_visitor_gets_one_answer_at_a_time(visit: visits.Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "PATIENCE", 0.01)
    busy: list[str] = []

    def tick(done: float, text: str) -> None:
        if not busy:
            with pytest.raises(ValueError, match="still being worked on") as error:
                visit.request("look")
            busy.append(str(error.value))

    visit.request("lay_out_samples", "9")
    visit.request("teach", "nine", CLOSED_FORM, tick=tick)
    assert busy


@pytest.mark.slow
def test_the_oldest_visit_makes_room_and_is_told(all_visits: visits.Visits, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = all_visits.start(), all_visits.start()
    for visit in (second, first):
        visit.request("look")
    monkeypatch.setattr(visits, "MAX_VISITS", 2)
    third = all_visits.start()  # the second was not used for the longest time
    with pytest.raises(visits.VisitEnded, match="ended to make room for other visitors"):
        second.request("look")
    assert not second.room.exists()
    third.request("look")
    assert first.bytes > 2**20
    monkeypatch.setattr(visits, "MAX_BYTES", third.bytes)
    all_visits.make_room()
    assert (first.ended, third.ended) == (visits.DROPPED, None)
    third.end()


class Unheard(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        Unheard("a\nb"),
        Unheard(),
        Unheard("\x1b[31m\u202e" + "x" * 10**6),
        zlib.error("Error -3"),
        RecursionError("deep"),
        MemoryError(),
        ZeroDivisionError("division by zero"),
        KeyError("<script>alert(1)</script>"),
        StopIteration(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_error_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(uploads, "take_images", fail)
    monkeypatch.setattr(opening, "open_hub", fail)
    monkeypatch.setattr(visitor.showing, "waiting", fail)
    guest = visitor.Visitor(opening.open_digits(), tmp_path)
    for name, given, place in [
        ("ask", [["a.png"]], "asked"),
        ("lay_out", [["a.png"]], "taught"),
        ("open_hub", ["a/b"], "opened"),
        ("clear", [], "taught"),
    ]:
        parts = visitor.answered(guest, name, given)
        assert list(parts) == [place]
        said = html.unescape(parts[place].split(">", 1)[1].removesuffix("</p>"))
        assert parts[place].startswith('<p class="message bad"')
        assert said.isprintable()
        assert 3 < len(said) < 1000
        assert "<script" not in parts[place]
