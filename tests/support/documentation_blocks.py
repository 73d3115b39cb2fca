"""Markdown pages taken apart: code blocks, what they presuppose, links, anchors."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT


# A block that is run or read by a machine says so; `text` is for eyes only.
LANGUAGES = ("python", "sh", "json", "yaml", "text")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*)(?P<options>[^`]*)$")
_GIVEN = re.compile(r"<!-- given: (.+?) -->")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)|(?:href|src)=\"([^\"]+)\"")
_ANCHOR = re.compile(r"<a (?:id|name)=\"([^\"]+)\"")
_CODE = re.compile(r"(`+)(?:.+?)\1(?!`)")


@dataclass(frozen=True)
class Block:
    """A code block; `line` is that of its first line of code, `title` the file it stands for."""

    line: int
    language: str
    title: str
    code: str


@dataclass(frozen=True)
class Given:
    """Names that what follows presupposes."""

    line: int
    names: tuple[str, ...]


def pages() -> list[Path]:
    """README, CONTRIBUTING and the site's pages: whose code is run."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def linked_pages() -> list[Path]:
    """All pages that people read: whose links are followed."""
    folders = [path for name in ("examples", ".github") for path in sorted((ROOT / name).rglob("*.md"))]
    return sorted({*pages(), *ROOT.glob("*.md"), *folders})


def name_of(page: Path) -> str:
    """The path of a page in the repository."""
    return page.relative_to(ROOT).as_posix()


def parts(page: Path) -> list[Block | Given]:
    """Code blocks and what they presuppose, in the order of the page."""
    found: list[Block | Given] = []
    prose = list(_prose(page, found))
    for number, line in prose:
        for names in _GIVEN.findall(line):
            found.append(Given(number, tuple(name.strip() for name in names.split(","))))
    return sorted(found, key=lambda part: part.line)


def links(page: Path) -> list[tuple[int, str]]:
    """Line and target of each link and picture."""
    found = []
    for number, line in _prose(page, []):
        for link in _LINK.finditer(_CODE.sub("", line)):
            found.append((number, link[1] or link[2]))
    return found


def code_words(page: Path) -> list[tuple[int, str]]:
    """Line and content of each `piece of code` in the prose."""
    return [(number, found[0].strip("` ")) for number, line in _prose(page, []) for found in _CODE.finditer(line)]


def anchors(page: Path) -> set[str]:
    """What a link to a place of the page may name, as code hosts and the site (pymdownx.slugs) make it of headings."""
    found: set[str] = set()
    for _, line in _prose(page, []):
        found.update(_ANCHOR.findall(line))
        if heading := _HEADING.match(line):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(slug)
    return found


def _prose(page: Path, blocks: list[Block | Given]) -> Iterator[tuple[int, str]]:
    """Lines outside code blocks, with their numbers; the blocks go to `blocks`."""
    opened: tuple[int, re.Match[str]] | None = None
    code: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is None and fence is None:
            yield number, line
        elif opened is None:
            assert fence is not None
            opened, code = (number, fence), []
        elif fence and fence["fence"].startswith(opened[1]["fence"]) and not fence["language"]:
            title = re.search(r"title=\"([^\"]+)\"", opened[1]["options"])
            text = textwrap.dedent("\n".join(code)) + "\n"
            blocks.append(Block(opened[0] + 1, opened[1]["language"], title[1] if title else "", text))
            opened = None
        else:
            code.append(line)
    assert opened is None, f"{page}:{opened[0]}: this block is never closed"
