"""Writes the two tables of docs/families.md.

    python docs/figures/families.py

tests/docs/test_families_page.py computes them again and compares.
"""

import re
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.automodel_families import NEEDS  # type: ignore[import-not-found, import-untyped, unused-ignore]
from support.family_tables import HEADER, refused, works  # type: ignore[import-not-found, import-untyped, unused-ignore]


PAGE = Path(__file__).parents[1] / "families.md"


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown, the first one being the header."""
    head, *body = ("| " + " | ".join(row) + " |\n" for row in rows)
    return head + "|" + "---|" * len(rows[0]) + "\n" + "".join(body)


def main() -> None:
    """Replace what stands behind the two marks."""
    working = works()
    text = PAGE.read_text()
    written = dict(re.findall(r"^\| (`\w+`) \| (.+) \|$", text.split("<!-- refused families -->")[1], re.MULTILINE))
    others: list[tuple[str, ...]] = [
        # Reasons that were found where further libraries are installed are kept.
        (name, written.get(name, reason) if reason.startswith(NEEDS) else reason)
        for name, reason in refused({row[1].strip("`") for row in working})
    ]
    for mark, rows in (("families", [HEADER, *working]), ("refused families", [("class", "why"), *others])):
        before, behind = text.split(f"<!-- {mark} -->\n")
        text = f"{before}<!-- {mark} -->\n" + table(rows) + re.sub(r"^(\|.*\n)*", "", behind)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
