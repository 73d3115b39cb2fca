"""Files of strangers are read up to a limit, and only if they are regular files."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hostile_bench import check_told, edited
from support.hostile_watch import bounded, peak_memory

from cl_prompts import AutoPromptPoolModel
from cl_prompts.sharing.card import write_card
from cl_prompts.sharing.inspect import describe_adapter
from cl_prompts.storage.bounded_read import read_bounded, read_json_object


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # such names are short
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


ODD: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": unix_socket,
}
CHANGES: dict[str, Callable[[Path], Any]] = {
    **ODD,
    "padded": lambda path: (path.touch(), os.truncate(path, 3 * 2**30)),  # with a hole: it takes no room
}


@pytest.mark.parametrize("odd", ODD)
def test_only_regular_files_are_read(odd: str, tmp_path: Path) -> None:
    ODD[odd](tmp_path / "x.json")
    with bounded(), pytest.raises(ValueError, match=r"x.json is a folder, a device or a pipe: put a regular file there"):
        read_bounded(tmp_path / "x.json", 100)


def test_sizes_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(FileNotFoundError):
        read_bounded(file, 3)
    file.write_bytes(b"abc")
    assert read_bounded(file, 3) == b"abc"
    with pytest.raises(ValueError, match=r"x.json has 3 bytes, more than the limit of 2: the file is not what"):
        read_bounded(file, 2)
    file.write_bytes(b'\xef\xbb\xbf{"a": [1, 2, 3]}')
    assert read_json_object(file, 100) == {"a": [1, 2, 3]}
    with pytest.raises(ValueError, match=r"x.json has more than 1 entries"):
        read_json_object(file, 100, 1)
    for content in (b"[" * 99, b"\xff", b"{", b"9" * 99, b'{"a": ' + b"9" * 5000 + b"}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.json (is truncated or no JSON|holds no JSON object)") as told:
            read_json_object(file, 10_000)
        check_told(told.value)


OF_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "results.json", "README.md")
OF_BASE = ("config.json", "model.safetensors")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*OF_ADAPTER, *(f"base/{name}" for name in OF_BASE)])
def test_no_file_of_an_adapter_or_base_is_read_for_ever(name: str, change: str, tmp_path: Path) -> None:
    """Whoever reads it says in a line which file it is."""
    folder = edited("vpt", tmp_path, lambda config: config.update(base_model_name_or_path=None))
    (folder / "base").mkdir()
    (folder / name).unlink(missing_ok=True)
    if name.startswith("base/") and name != "base/config.json":
        (folder / "base" / "config.json").write_text('{"model_type": "vit"}')
    CHANGES[change](folder / name)
    act: Callable[[Path], Any] = {
        "results.json": describe_adapter,
        "README.md": write_card,
        "preprocessor_config.json": pipeline,
    }.get(name, AutoPromptPoolModel.from_pretrained)
    with bounded(room=2**33), peak_memory() as peak, pytest.raises((ValueError, OSError), match=Path(name).name) as told:
        act(folder)
    check_told(told.value)
    assert peak() < 100 * 2**20


def pipeline(folder: Path) -> None:
    from support.hostile_bench import base_of
    from support.make_adapter_fixtures import NEWEST

    from cl_prompts import PromptPoolPipeline

    PromptPoolPipeline.from_pretrained(folder, base=base_of(NEWEST))
