"""The page with thirty visitors, one of whom is hostile, each time in another way: the others are answered all the while.

pytest -m slow -n 0 -s tests/examples/test_space_crowd.py
"""

from __future__ import annotations

import json
import re
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import opening
import pytest
from huggingface_hub import HfApi
from PIL import Image
from support.hub_server import Hub
from support.paths import EXAMPLES
from transformers import ViTModel

from cl_prompts import VPTConfig, get_prompt_pool_model


pytest.importorskip("gradio")
from support.space_server import Caller, served


pytestmark = pytest.mark.slow

VISITORS = 30
SECONDS = 2.0
SAMPLES = EXAMPLES / "space" / "samples"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, running_hub: Hub) -> Iterator[str]:
    place = tmp_path_factory.mktemp("crowd")
    hub = {"HF_ENDPOINT": running_hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home")}
    yield from served(EXAMPLES / "space" / "app.py", place / "temporary", **hub)


@pytest.fixture(scope="module")
def visitors(url: str) -> list[Caller]:
    return [Caller(url) for _ in range(VISITORS - 1)]


def said(parts: dict[str, Any], place: str) -> str:
    text = parts[place]
    assert isinstance(text, str), parts
    return text


Act = Callable[[Caller], str]  # what the page tells the hostile visitor


def large_matrix(room: Path) -> Act:
    """40 MB of prompts, each compared with each, which would take minutes."""
    base = ViTModel.from_pretrained(opening.MICRO_VIT, add_pooling_layer=False)
    model = get_prompt_pool_model(base, VPTConfig(prompt_length=10 * 2**20 // base.config.hidden_size))
    model.begin_task([0])
    model.end_task()
    model.save_pretrained(room)

    def act(hostile: Caller) -> str:
        assert "The pool is open" in said(hostile.upload("adapter-files", [room / name for name in FILES]), "opened")
        return said(hostile.call("ask-samples"), "asked")

    return act


def base_with_adapter(room: Path) -> Act:
    """A base with a LoRA beside it, whose pattern backtracks for ever."""
    api = HfApi()
    base = ViTModel.from_pretrained(opening.MICRO_VIT, add_pooling_layer=False)
    base.save_pretrained(room / "base")
    lora = {"peft_type": "LORA", "target_modules": "(([a-z0-9._])+)+!", "r": 20_000_000}
    (room / "base" / "adapter_config.json").write_text(json.dumps(lora))
    (room / "base" / "config.json").write_bytes((room / "base" / "config.json").read_bytes() + b" " * 2**25)
    for name in FILES:
        (room / name).write_bytes((opening.DIGITS / name).read_bytes())
    content = json.loads((room / FILES[0]).read_text()) | {"base_model_name_or_path": "evil/base"}
    content["state"]["base_fingerprint"] = "0" * 64
    (room / FILES[0]).write_text(json.dumps(content))
    for repo_id, folder in (("me/base", room / "base"), ("me/pool", room)):
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return lambda hostile: said(hostile.call("open-hub", "me/pool"), "opened")


def many_entries(room: Path) -> Act:
    """A zip of a million entries."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry) * 10**6, 0, 0)
    (room / "many.zip").write_bytes(entry * 10**6 + end)
    return lambda hostile: said(hostile.upload("adapter-files", [room / "many.zip"]), "opened")


def bomb(room: Path) -> Act:
    """A zip whose files unpack to more than they may."""
    with zipfile.ZipFile(room / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in FILES:
            archive.writestr(name, bytes(200 * 2**20))
    return lambda hostile: said(hostile.upload("adapter-files", [room / "bomb.zip"]), "opened")


def large_pictures(room: Path) -> Act:
    """Twenty pictures of 39 million pixels, 40 kB each."""
    content = BytesIO()
    Image.new("RGB", (6500, 6000)).save(content, "PNG")
    for number in range(20):
        (room / f"{number}.png").write_bytes(content.getvalue())

    def act(hostile: Caller) -> str:
        parts = hostile.upload("ask-files", sorted(room.glob("*.png")))
        return said(parts, "asked") or said(parts, "answers")

    return act


def programs(room: Path) -> Act:
    """Twenty EPS texts called pictures."""
    for number in range(20):
        (room / f"{number}.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n")
    return lambda hostile: said(hostile.upload("ask-files", sorted(room.glob("*.jpg"))), "asked")


def words(room: Path) -> Act:
    """Markup and control characters as the name of a class, and a record of numbers without end."""
    record = json.loads((opening.DIGITS / "results.json").read_text()) | {"seconds": 10**400, "data": "<script>"}
    (room / "results.json").write_text(json.dumps(record))
    files = [opening.DIGITS / name for name in FILES]

    def act(hostile: Caller) -> str:
        told = said(hostile.upload("adapter-files", [*files, room / "results.json"]), "opened")
        hostile.call("use-8")
        return told + said(hostile.call("teach", "<script>\x1b[31m\u202e", "Closed form, nothing is trained"), "taught")

    return act


# What is prepared, done, and told by the page.
WAYS: dict[str, tuple[Callable[[Path], Act], str]] = {
    "large matrix": (large_matrix, "too much time or memory"),
    "base": (base_with_adapter, "message bad"),
    "entries": (many_entries, "is no zip that can be read"),
    "bomb": (bomb, "more than"),
    "large pictures": (large_pictures, "<article|too much time"),  # on a busy machine
    "programs": (programs, "is no picture that can be read here"),
    "words": (words, "Learned as task 5"),
}


@pytest.mark.parametrize("way", WAYS)
def test_others_are_answered(way: str, url: str, visitors: list[Caller], tmp_path: Path, running_hub: Hub) -> None:
    prepare, expected = WAYS[way]
    act = prepare(tmp_path)
    hostile, told = Caller(url), list[str]()
    thread = threading.Thread(target=lambda: told.append(act(hostile)))
    seconds: list[float] = []
    thread.start()
    while thread.is_alive() or len(seconds) < len(visitors):
        for number, visitor in enumerate(visitors):
            started = time.monotonic()
            parts = visitor.upload("ask-files", [SAMPLES / "digits" / f"digit-{number % 8}.png"])
            seconds.append(time.monotonic() - started)
            assert said(parts, "answers").count("<article") == 1
    thread.join()
    print(f"\n{way}: {len(seconds)} answers, {sorted(seconds)[len(seconds) // 2]:.2f} s, at most {max(seconds):.2f} s")
    assert re.search(expected, told[0]), told
    assert "Traceback" not in told[0]
    assert max(seconds) < SECONDS
