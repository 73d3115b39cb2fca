"""The figures of docs/ say what the code does."""

import json
import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.paths import DOCS, ROOT


DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def texts(svg: Path) -> list[str]:
    """All text in a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


@pytest.mark.parametrize(("name", "written"), [("batch_path", "42 tokens"), ("reading_path", "tuner/forward.py")])
def test_a_figure_is_what_the_code_does(name: str, written: str, tmp_path: Path) -> None:
    script: dict[str, Any] = runpy.run_path(str(DOCS / "figures" / f"{name}.py"))
    committed = DOCS / "images" / f"{name}.svg"
    script["save"](tmp_path / "now.svg")
    kept = ElementTree.parse(committed).getroot().find(f".//{DESCRIPTION}")
    assert kept is not None
    assert json.loads(kept.text or "") == script["record"](), f"run python docs/figures/{name}.py"
    assert texts(committed) == texts(tmp_path / "now.svg"), f"run python docs/figures/{name}.py"
    assert written in " ".join(texts(committed))  # the pattern finds what is written


def test_the_passes_of_a_full_run_are_those_of_its_recipe() -> None:
    script: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "full_size.py"))
    assert script["table"]() in (ROOT / "benchmarks" / "full_size.md").read_text(), "run python benchmarks/full_size.py"
    hours = script["table"](step=500.0, forward=1500.0).splitlines()
    assert hours[2].endswith("| 0.18 |")  # 250,000 / 500 + 210,000 / 1,500 seconds


def test_a_forward_is_read_in_six_files() -> None:
    """The page lists the files of the figure, an L2P forward runs through each, and they are short together."""
    script: dict[str, Any] = runpy.run_path(str(DOCS / "figures" / "reading_path.py"))
    found = script["record"]()
    assert len(found["read"]) <= 6
    assert all(found["read"].values()), "each of them runs"
    assert sum(found["lines"].values()) <= 900
    page = (DOCS / "development.md").read_text()
    listed = re.findall(r"^\| `(src/cl_prompts/\S+)` \|", page, re.MULTILINE)
    assert listed == [f"src/cl_prompts/{name}" for name in found["read"]]
    assert all((ROOT / name).is_file() for name in listed)
    assert f"{sum(found['lines'].values())} lines together" in page
