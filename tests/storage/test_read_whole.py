"""A read that fails while its folder is swapped is tried again; one that fails by itself is not."""

import os
from pathlib import Path

import pytest

from cl_prompts.storage.atomic import read_whole


KINDS = [ValueError, FileNotFoundError, RuntimeError]


@pytest.mark.parametrize("kind", KINDS)
def test_a_swapped_folder_is_read_again(tmp_path: Path, kind: type[Exception]) -> None:
    folder, calls = tmp_path / "adapter", []
    folder.mkdir()

    def read() -> str:
        calls.append(len(calls))
        if calls == [0]:
            os.rename(folder, tmp_path / "old")
            folder.mkdir()
            raise kind("it was there a moment ago")
        return "whole"

    assert read_whole(folder, read) == "whole"
    assert calls == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_fails_by_itself_fails_at_once(tmp_path: Path, kind: type[Exception]) -> None:
    calls = []

    def read() -> None:
        calls.append(len(calls))
        raise kind("always")

    with pytest.raises(kind, match="always"):
        read_whole(tmp_path, read)
    assert calls == [0]
