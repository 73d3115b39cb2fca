"""The figures of docs/ say what the code does."""

import json
import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from support.paths import DOCS


DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


def texts(svg: Path) -> list[str]:
    """All that is written in a picture."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text())


def test_the_path_of_a_batch_is_what_the_code_does(tmp_path: Path) -> None:
    script: dict[str, Any] = runpy.run_path(str(DOCS / "figures" / "batch_path.py"))
    committed = DOCS / "images" / "batch_path.svg"
    script["save"](tmp_path / "now.svg")
    kept = ElementTree.parse(committed).getroot().find(f".//{DESCRIPTION}")
    assert kept is not None
    assert json.loads(kept.text or "") == script["record"](), "run python docs/figures/batch_path.py"
    assert texts(committed) == texts(tmp_path / "now.svg"), "run python docs/figures/batch_path.py"
    assert "42 tokens" in texts(committed)  # the pattern finds what is written
