"""Chromium for the browser tests, and the folder of their screenshots.

Needs the extra `browser` and Debian's package `chromium`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


WIDTHS = {"desktop": 1280, "phone": 390}  # pixels


def launched() -> Iterator[Any]:
    """A browser, closed at the end."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


def screenshot_folder(factory: pytest.TempPathFactory) -> Path:
    """The folder that CL_PROMPTS_SCREENSHOTS names, else one of pytest's own."""
    folder = os.environ.get("CL_PROMPTS_SCREENSHOTS")
    found = Path(folder) if folder else factory.mktemp("screenshots")
    found.mkdir(parents=True, exist_ok=True)
    return found


OVERFLOW = """() => [...document.body.querySelectorAll('*')].filter(element => {
    const box = element.getBoundingClientRect();
    if (box.width === 0 || box.height === 0 || box.right <= innerWidth + 1) return false;
    for (let outer = element.parentElement; outer; outer = outer.parentElement)
        if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(outer).overflowX)
            && outer.getBoundingClientRect().right <= innerWidth + 1) return false;
    return getComputedStyle(element).visibility !== 'hidden';
}).map(element => `${element.tagName} ${element.id} ${element.className}: ${element.textContent.slice(0, 60)}`)"""


def overflow(page: Any) -> list[str]:
    """What stands beyond the right edge of the window, except inside an element that scrolls."""
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return [*([f"the page is {wide} pixels too wide"] if wide > 0 else []), *page.evaluate(OVERFLOW)]
