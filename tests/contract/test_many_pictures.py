"""Two thousand pictures over formats, sizes and damage, through library, command and page.

pytest -m slow -n 0 -s tests/contract/test_many_pictures.py
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import opening
import pytest
import visitor
from PIL import Image
from support.fuzzing import mutated, seeds
from support.hostile_bench import check_told
from support.hostile_watch import peak_memory

from cl_prompts.cli import main


pytestmark = pytest.mark.slow

MANY = 2000
BYTES = 400 * 2**20
OTHER_FORMATS = ("EPS", "PCX", "TGA", "ICO", "SGI", "IM", "XBM", "DDS", "PDF", "JPEG2000", "AVIF", "ICNS", "MSP", "SPIDER")
PROCESSES = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "os.system", "os.startfile")


def drawn() -> Iterator[tuple[str, bytes]]:
    """Names, which say nothing of the format, and contents."""
    for number, content in enumerate(large()):
        yield f"large-{number}.png", content
    rgb = Image.linear_gradient("L").resize((32, 32))
    for kind in OTHER_FORMATS:
        made = BytesIO()
        try:
            rgb.convert({"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(kind, "RGB")).save(made, kind)
        except (OSError, KeyError):  # this Pillow cannot write it
            continue
        yield f"{kind}.jpg", made.getvalue()
    corpus = seeds("picture")
    for number in range(MANY):
        random = Random(f"many {number}")
        seed = random.choice(corpus)
        suffix = random.choice([".jpg", ".png", ".eps", Path(seed.name).suffix])
        yield f"{number}{suffix}", seed.content if number % 10 == 0 else mutated(random, seed, corpus)


def large() -> Iterator[bytes]:
    """Files of few bytes and many pixels: at the limits, beyond, and cut off."""
    for mode, kind, options in [
        ("RGB", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("I;16", "PNG", {}),
        ("RGB", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("L", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {"method": 0}),
    ]:
        for size in [(7000, 7000), (40, 900_000)] if kind in ("PNG", "TIFF") else [(7000, 7000)]:
            size = (4900, 4900) if kind == "WEBP" else size
            made = BytesIO()
            Image.new(mode, size).save(made, kind, **options)
            yield made.getvalue()
            yield made.getvalue()[:-20]
    for side in (4900, 7000):  # within the limit of this kind, and beyond it
        made = BytesIO()
        Image.new("CMYK", (side, side)).save(made, "JPEG", progressive=True)
        yield made.getvalue()
    for size in [(16_000, 16_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)]:
        made = BytesIO()
        Image.new("L", (9, 9)).save(made, "PNG")
        content = bytearray(made.getvalue())
        content[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        yield bytes(content)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    for name, content in drawn():
        (folder / name).write_bytes(content)
    found = sorted(str(path) for path in folder.iterdir())
    assert len(found) >= MANY
    return found


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What started a process; a false Ghostscript stands on the path."""
    mark = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow looks for it once
    seen: list[str] = []
    sys.addaudithook(lambda event, args: seen.append(event) if event in PROCESSES else None)
    yield seen
    assert not mark.exists()


def report(way: str, answered: int, refused: int, peak: int) -> None:
    print(f"\n{way}: {answered} answered, {refused} refused, {peak / 2**20:.0f} MB above the model")
    assert peak < BYTES
    assert min(answered, refused) > 300


def test_library(pictures: list[str], started: list[str]) -> None:
    pipe, answered = opening.open_digits().pipe, 0
    pipe(pictures[0] if "large" not in pictures[0] else np.zeros((32, 32, 3), np.uint8))
    with peak_memory() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged metadata
        for path in pictures:
            try:
                answered += len(pipe(path)) > 0
            except ValueError as error:
                check_told(error)
    assert not started
    report("library", answered, len(pictures) - answered, peak())


def test_command(pictures: list[str], started: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--adapter", str(opening.DIGITS), "--base", str(opening.MICRO_VIT), "--json", "--top-k", "1"]
    assert main(["predict", *asked, str(opening.HERE / "samples" / "try" / "digit-0.png")]) == 0
    capsys.readouterr()
    with peak_memory() as peak:
        assert main(["predict", *asked, *pictures]) == 1
    said, told = (text.splitlines() for text in capsys.readouterr())
    assert {json.loads(line)["image"] for line in said} < set(pictures)
    assert all(line.isprintable() and line.startswith("cl-prompts: ") for line in told)
    told = [line for line in told if not line.startswith("cl-prompts: warning: ")]  # Pillow's, of damaged metadata
    assert len(said) + len(told) == len(pictures)
    assert not started
    with capsys.disabled():
        report("command", len(said), len(told), peak())


def test_page(pictures: list[str], started: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guest, answered, refused = visitor.Visitor(opening.open_digits(), tmp_path), 0, 0
    guest.ask_samples()
    with peak_memory() as peak:
        for start in range(0, len(pictures), 20):
            parts: dict[str, Any] = visitor.answered(guest, "ask", [pictures[start : start + 20]])
            lines = parts["asked"].count('class="message bad"')
            refused += lines
            answered += min(len(pictures) - start, 20) - lines
            if lines < 20 and len(pictures) - start >= 20:
                assert parts["answers"].count("<article") == 20 - lines
    assert capsys.readouterr().err == ""
    assert not started
    with capsys.disabled():
        report("page", answered, refused, peak())
