"""What people read is true: all code of README, CONTRIBUTING and docs/ runs, all links lead somewhere."""

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from support.documentation_blocks import (
    LANGUAGES,
    ROOT,
    Block,
    Given,
    anchors,
    code_words,
    linked_pages,
    links,
    name_of,
    pages,
    parts,
)
from support.documentation_commands import check_shell
from support.documentation_givens import provide, put_base_on_the_hub
from support.hub_server import Hub
from transformers.utils import logging


REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


@pytest.fixture
def quiet() -> Any:
    """Commands and trainers talk; the command also silences transformers for the rest of its process."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


def with_code() -> list[Path]:
    return [page for page in pages() if any(isinstance(part, Block) for part in parts(page))]


@pytest.mark.by_turns(5)
@pytest.mark.parametrize("page", with_code(), ids=name_of)
@pytest.mark.usefixtures("quiet")
def test_code_of_a_page_runs(page: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace and one empty folder, with nothing but what the page says it presupposes."""
    monkeypatch.chdir(tmp_path)
    put_base_on_the_hub(hub)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    scripts: list[str] = []
    for part in parts(page):
        place = f"{name_of(page)}:{part.line}"
        if isinstance(part, Given):
            for name in part.names:
                provide(name, namespace)
            continue
        assert part.language in LANGUAGES, f"{place}: {part.language!r} is none of {LANGUAGES}"
        scripts += [part.title] if part.title else []
        if part.language == "python":
            # Empty lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * (part.line - 1) + part.code, str(page), "exec"), namespace)
        elif part.language == "sh":
            check_shell(part.code, scripts)
        elif part.language == "json":
            json.loads(part.code)
        elif part.language == "yaml":
            yaml.safe_load(part.code)


@pytest.mark.parametrize("page", linked_pages(), ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Files and their anchors inside the repository; nothing is asked of the network."""
    for line, target in links(page):
        url = urlsplit(re.sub(rf"^{REPOSITORY}/(?:blob|raw|tree)/main/", f"{os.path.relpath(ROOT, page.parent)}/", target))
        if url.scheme:
            assert url.scheme in ("https", "mailto"), f"{name_of(page)}:{line}: {target}"
            continue
        file = (page.parent / url.path).resolve() if url.path else page
        assert file.exists(), f"{name_of(page)}:{line}: {target} does not exist"
        assert file.is_relative_to(ROOT), f"{name_of(page)}:{line}: {target} is outside the repository"
        if url.fragment:
            assert url.fragment in anchors(file), f"{name_of(page)}:{line}: {target}; there are {sorted(anchors(file))}"


@pytest.mark.parametrize("page", with_code(), ids=name_of)
def test_commands_name_no_folder_outside_the_repository(page: Path) -> None:
    """A reader has the repository and the network only."""
    assert not [part.line for part in parts(page) if isinstance(part, Block) and "../" in part.code]


@pytest.mark.parametrize("page", linked_pages(), ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """`src/cl_prompts/methods/hash/pool.py` and the like, in prose."""
    for line, word in code_words(page):
        if re.fullmatch(r"(?:docs|examples|tests|src|benchmarks|\.ci|\.github)/[\w./-]*", word):
            assert (ROOT / word).exists(), f"{name_of(page)}:{line}: there is no {word}"


# ---- the tests above fail where they should ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("rm -rf results", "unknown command: rm -rf results"),
        ("pytest tests/test_nothing.py", "tests/test_nothing.py"),
        ("pip install -e '.[trian]' -c constraints.txt", "the extras are"),
        ("cd examples && python nothing.py", "there is no nothing.py"),
        ("accelerate launch examples/train_cil.py --epoch 3 --nothing 1", "no such arguments"),
        ("OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/train_cil.py --recipe nothing", "no recipe 'nothing'"),
        ("torchrun --nothing 2 examples/train_cil.py", "torchrun"),
        ("cl-prompts compare compare_digits --rows Nobody", "the rows are"),
        ("cl-prompts compare compare_digits \\\n    --epoch many", "no such arguments: ['--epoch', 'many']"),
        ("python benchmarks/memory.py --batch many", "memory.py"),
        ("cl-prompts inspect nowhere", "cl-prompts inspect nowhere"),
        ("cl-prompts explode", "cl-prompts explode"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_commands_that_are_none(line: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(complaint)):
        check_shell(line)


@pytest.mark.parametrize(
    "line",
    [
        "# nothing but a comment",
        "cl-prompts compare compare_digits --seeds 0 1  # two seeds",
        "accelerate launch --num_processes 4 examples/train_cil.py --tasks 5",
        "python benchmarks/memory.py --batch 4",
        "python own.py --whatever",
    ],
)
def test_commands_that_are_right(line: str) -> None:
    check_shell(line, scripts=["own.py"])


def test_pages_are_taken_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, twice: [two](b.md#x)\n<!-- given: vit, owl.jpg -->\n- item\n\n"
        '  ```python title="own.py"\n  1 / 2\n  ```\n'
        '````text\n```\n[no](link.md)\n````\n<a id="here"></a>![a picture](c.png) `[no](link.md)` [one `code`](<d.md>)\n'
    )
    assert parts(page) == [
        Given(2, ("vit", "owl.jpg")),
        Block(6, "python", "own.py", "1 / 2\n"),
        Block(9, "text", "", "```\n[no](link.md)\n"),
    ]
    assert links(page) == [(1, "b.md#x"), (12, "c.png"), (12, "d.md")]
    assert anchors(page) == {"a-title-twice-two", "here"}
    page.write_text("```python\n1 / 2\n")
    with pytest.raises(AssertionError, match="never closed"):
        parts(page)
