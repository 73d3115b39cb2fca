"""The documentation site, built and read from the disk in Chromium. `pytest -m browser -n 0`, see docs/space.md."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chromium import WIDTHS, overflow
from support.paths import ROOT


pytestmark = pytest.mark.browser

SHOWN = ("index", "quickstart", "choosing", "results", "methods/index", "families", "api/models")  # with a screenshot
LEGIBLE = 8.5  # pixels, of the smallest text in a drawing
BROKEN_NAMES = """() => [...document.querySelectorAll('td code')]
    .filter(code => /^\\w+$/.test(code.textContent) && code.getClientRects().length > 1)
    .map(code => code.textContent)"""
UNSCROLLED = """() => [...document.querySelectorAll('.md-typeset table')]
    .filter(table => table.scrollWidth > table.closest('.md-content').clientWidth)
    .filter(table => !['auto', 'scroll'].includes(getComputedStyle(table.closest('.md-typeset__scrollwrap')).overflowX))
    .map(table => table.textContent.slice(0, 60))"""

SCROLLED = """() => [...document.querySelectorAll('.md-typeset__scrollwrap')]
    .filter(wrap => wrap.scrollWidth > wrap.clientWidth).map(wrap => wrap.textContent.slice(0, 60))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """A window; what the page asks of other hosts, or says on the console, is an error."""
    wrong: list[str] = []
    with chromium.new_context(viewport={"width": WIDTHS["desktop"], "height": 844}) as context:
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        yield page
    assert not wrong, wrong


def smallest_text(drawing: Path) -> float:
    """Size of the smallest text in an SVG, as a share of its width."""
    content = drawing.read_text()
    width = re.findall(r'viewBox="0 0 (\S+) ', content)[0]
    return min(map(float, re.findall(r"font(?:-size)?: ([\d.]+)px", content))) / float(width)


@pytest.mark.parametrize("device", WIDTHS)
def test_every_page_fits_and_is_legible(opened: Any, site: Path, screenshots: Path, device: str) -> None:
    opened.set_viewport_size({"width": WIDTHS[device], "height": 844})
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")
    assert len(pages) > 40
    for file in pages:
        name = str(file.relative_to(site).with_suffix(""))
        opened.goto(file.as_uri())
        assert not overflow(opened), name
        assert not opened.evaluate(UNSCROLLED), name
        assert not opened.evaluate(BROKEN_NAMES), name
        assert "_runtime(" not in opened.locator("article").inner_text(), name
        for source, width in opened.evaluate(
            "[...document.querySelectorAll('article img[src$=\".svg\"]')].map(i => [i.src, i.clientWidth])"
        ):
            assert width * smallest_text(Path(source.removeprefix("file://"))) >= LEGIBLE, source
        if (device, name) == ("desktop", "methods/index"):
            assert not opened.evaluate(SCROLLED), "the table of methods is seen whole"
        if name in SHOWN:
            opened.screenshot(path=screenshots / f"site-{name.replace('/', '-')}-{WIDTHS[device]}.png", full_page=True)


def test_a_page_on_the_disk_is_found_by_the_search(opened: Any, site: Path) -> None:
    opened.goto((site / "methods" / "l2p.html").as_uri())
    opened.click("input[name=query]")
    opened.keyboard.type("task-free")
    found = opened.locator(".md-search-result__item a", has_text="Choosing a method").first
    found.wait_for()
    found.click()
    opened.wait_for_url("**/choosing.html*")
