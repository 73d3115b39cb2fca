"""Commands of the documentation: ours are run, the examples' are read by their own parsers, others must be known."""

import argparse
import contextlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from cl_prompts.cli import main
from cl_prompts.runs import comparison
from cl_prompts.runs.arguments import read_arguments
from support.documentation_blocks import ROOT


# What a page may tell people to type, and what no test here runs: installing, other tools, their own shell.
KNOWN = (
    ". .venv/bin/activate",
    "accelerate config",
    "apt install",
    "apt-get install",
    "apt-get update",
    "bash .ci/run",
    "bash .ci/long",
    "cd",
    "export",
    "git clone",
    "git push",
    "hf auth login",
    "hf download",
    "mkdocs build",
    "mkdocs serve",
    "mypy",
    "pre-commit install",
    "pre-commit run",
    "pytest",
    "python -m venv",
    "python3 -m venv",
    "ruff check",
    "ruff format",
)


class Parsed(Exception):
    """A script has read its arguments; that is all that was wanted of it."""


def check_shell(code: str, scripts: Sequence[str] = ()) -> None:
    """Run or read each command of a block.

    Args:
        code: of the block.
        scripts: files that the page has told people to write.

    Raises:
        AssertionError: a command is unknown, fails, or its arguments are none.
    """
    for words in commands(code):
        try:
            _check(words, scripts)
        except SystemExit as error:  # how parsers say no
            raise AssertionError(f"{shlex.join(words)}: {error.code}") from error


def commands(code: str) -> Iterator[list[str]]:
    """The words of each command, without comments and variables set for it."""
    for line in code.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                yield words
                words = []


def _check(words: list[str], scripts: Sequence[str]) -> None:
    if words[:2] == ["cl-prompts", "train"]:
        read_arguments(words[2:])
    elif words[:2] == ["cl-prompts", "compare"]:
        _read_comparison(words[2:])
    elif words[0] == "cl-prompts":
        assert main(words[1:]) == 0, shlex.join(words)
    elif words[:2] == ["accelerate", "launch"]:
        options = launch_command_parser().parse_args(words[2:])
        if options.module:
            _check([options.training_script.replace("cl_prompts", "cl-prompts"), *options.training_script_args], scripts)
        else:
            _read_arguments(options.training_script, options.training_script_args)
    elif words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        _read_arguments(options.training_script, options.training_script_args)
    elif words[0] in ("python", "python3") and words[1].endswith(".py"):
        if words[1] not in scripts:
            _read_arguments(words[1], words[2:])
    elif words[:2] == ["pip", "install"]:
        _check_install(words[2:])
    else:
        line = shlex.join(words)
        assert any(line == known or line.startswith(f"{known} ") for known in KNOWN), f"unknown command: {line}"
        missing = [w for w in words if w.startswith(("tests/", "examples/", "docs/")) and not (ROOT / w).exists()]
        assert not missing, f"{line}: {missing} do not exist"


def _read_arguments(script: str, words: Sequence[str]) -> None:
    """Let a script of the repository read its command line; nothing of it is run."""
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if script == "examples/train_cil.py":
        read_arguments(words)
    elif words:
        _parsed(path, words, lambda: runpy.run_path(str(path), run_name="__main__"))


def _read_comparison(words: Sequence[str]) -> None:
    options, further = _parsed(Path(comparison.__file__), words, comparison.main)
    rows = comparison.read_rows(options.comparison)
    assert set(options.rows or []) <= set(rows), f"{options.rows}: the rows are {sorted(rows)}"
    comparison.plan({row: rows[row] for row in options.rows or rows}, options.seeds, Path("results"), further)


def _parsed(path: Path, words: Sequence[str], start: Callable[[], Any]) -> tuple[argparse.Namespace, list[str]]:
    """What the first parser that a script makes says of its arguments; strange ones are left to who takes them."""
    real = argparse.ArgumentParser.parse_known_args
    real_all = argparse.ArgumentParser.parse_args
    read: list[tuple[argparse.Namespace, list[str]]] = []

    def known(parser: Any, *_: Any) -> Any:
        read.append(real(parser, list(words)))
        raise Parsed

    def every(parser: Any, *_: Any) -> Any:
        with patch.object(argparse.ArgumentParser, "parse_known_args", real):
            read.append((real_all(parser, list(words)), []))
        raise Parsed

    with (
        patch.object(argparse.ArgumentParser, "parse_known_args", known),
        patch.object(argparse.ArgumentParser, "parse_args", every),
        patch.object(sys, "argv", [str(path), *words]),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.suppress(Parsed),
    ):
        start()
    assert read, f"{path} reads no arguments"
    return read[0]


def _check_install(words: Sequence[str]) -> None:
    """Extras that are asked for exist, files of versions too."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for word, before in zip(words, ["", *words], strict=False):
        if asked := re.fullmatch(r"(?:\.|cl-prompts)\[(.+)\]", word):
            assert set(asked[1].split(",")) <= extras, f"{word}: the extras are {sorted(extras)}"
        if before in ("-c", "-r"):
            assert (ROOT / word).is_file(), f"{word} does not exist"
