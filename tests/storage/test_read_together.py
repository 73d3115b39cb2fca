"""Files of one save that are read while another save replaces them are read again; other errors come at once."""

import os
from pathlib import Path

import pytest

from cl_prompts.storage.staging import read_together


def two_files(folder: Path, content: str) -> list[Path]:
    """Two files that replace those of the same names."""
    paths = [folder / "config.json", folder / "weights"]
    for path in paths:
        path.with_suffix(".new").write_text(content)
        os.replace(path.with_suffix(".new"), path)
    return paths


@pytest.mark.parametrize("fails", [True, False])
def test_replaced_files_are_read_again(tmp_path: Path, fails: bool) -> None:
    """Also when the reader did not notice, and held the config of one save and the weights of the next."""
    paths, calls = two_files(tmp_path, "old"), []

    def read() -> list[str]:
        calls.append(len(calls))
        config = paths[0].read_text()
        if calls == [0]:
            two_files(tmp_path, "new")
            if fails:
                raise ValueError("they do not fit each other")
        return [config, paths[1].read_text()]

    assert read_together(paths, read) == ["new", "new"]
    assert calls == [0, 1]


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError])
def test_an_error_with_unchanged_files_is_raised_at_once(tmp_path: Path, kind: type[Exception]) -> None:
    paths, calls = two_files(tmp_path, "old"), []

    def read() -> None:
        calls.append(len(calls))
        (tmp_path / "of the user").touch()
        raise kind("always")

    with pytest.raises(kind, match="always"):
        read_together(paths, read)
    assert calls == [0]
